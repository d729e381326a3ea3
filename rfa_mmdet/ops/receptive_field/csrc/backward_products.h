// The matrix products of a backward pass: transposed weight times grad_y, and weighted features
// times transposed grad_y. One class uses gemm.h in the compute type, the other bfloat16.h.
//
// Each class holds the packed weight. Its `Thread` holds grad_y of a tile, (outputs, positions),
// and the features of a block of channels there. `enter` packs grad_y, whose rows are `stride`
// apart. `multiply` writes the gradient of a block's features, (channels * K, positions). Write a
// channel's features, (K, positions), to `features` and call `keep`; `add_weight` adds their
// products.
#pragma once

#include <ATen/Parallel.h>

#include "bfloat16.h"
#include "gemm.h"
#include "kernels.h"

namespace rfa {
namespace {

template <typename E>
class BackwardProducts {
  using T = Compute<E>;

 public:
  static constexpr int64_t kBytes = 192 << 10; // of features, which must fit in L2 with the rest

  BackwardProducts(const Geometry& g, int64_t block, const E* weight)
      : K(g.K()), in_group(g.C / g.groups), outputs(g.O / g.groups), block(block),
        packed(g.O * in_group * K, false) {
    pack(g, weight);
  }

  class Thread {
   public:
    Thread(const BackwardProducts& of, int64_t positions, bool of_weight)
        : of(of), pitch(positions), of_weight(of_weight), panels(1), across(of.outputs),
          along(of.outputs * positions), transposed(of_weight ? across.padded() * positions : 0),
          u(of.block * of.K * positions) {}
    void enter(const E* grad_y, int64_t stride, int64_t columns) {
      panels = Panels<T>(columns);
      pack_along(grad_y, stride);
      if (of_weight) {
        pack_across(grad_y, stride);
      }
    }
    void multiply(int64_t group, int64_t first, int64_t count, T* grad) const {
      const T* const a = of.packed.get() + (group * of.in_group + first) * of.K * of.outputs;
      gemm<T>(count * of.K, of.outputs, {a, 0}, along.get(), panels, grad, pitch, false, nullptr,
              true);
    }
    T* features(int64_t i) const {
      return u.get() + i * of.K * pitch;
    }
    void keep(int64_t) const {}
    void add_weight(int64_t count, T* out, int64_t stride) const {
      gemm<T>(count * of.K, panels.columns, {u.get(), pitch}, transposed.get(), across, out, stride,
              true, nullptr, true);
    }

   private:
    void pack_along(const E* from, int64_t stride) const {
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t width = panels.width_of(panel), start = panels.start(panel);
        const int64_t real = std::min(width, panels.columns - start);
        T* to = along.get() + start * of.outputs;
        for (int64_t o = 0; o < of.outputs; ++o, to += width) {
          const E* row = from + o * stride + start;
          for (int64_t q = 0; q < real; ++q) {
            to[q] = static_cast<T>(row[q]);
          }
          std::fill(to + real, to + width, T(0));
        }
      }
    }
    void pack_across(const E* from, int64_t stride) const {
      for (int64_t panel = 0; panel < across.count; ++panel) {
        const int64_t width = across.width_of(panel), start = across.start(panel);
        T* to = transposed.get() + start * panels.columns;
        constexpr int64_t step = 16;
        for (int64_t q = 0; q < panels.columns; q += step) {
          const int64_t many = std::min(step, panels.columns - q);
          for (int64_t o = 0; o < width; ++o) {
            const bool real = start + o < of.outputs;
            const E* row = from + (start + o) * stride + q;
            for (int64_t i = 0; i < many; ++i) {
              to[(q + i) * width + o] = real ? static_cast<T>(row[i]) : T(0);
            }
          }
        }
      }
    }

    const BackwardProducts& of;
    const int64_t pitch;
    const bool of_weight;
    Panels<T> panels;
    const Panels<T> across;
    Buffer<T> along, transposed, u;
  };

 private:
  // Transpose to [group][block][block of its rows][output][row].
  void pack(const Geometry& g, const E* weight) const {
    const int64_t depth = in_group * K, step = block * K, blocks = ceil_div(depth, step);
    at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, start = i % blocks * step;
        const int64_t size = std::min(step, depth - start);
        const E* from = weight + group * outputs * depth + start;
        T* to = packed.get() + group * outputs * depth + start * outputs;
        constexpr int64_t strip = 16; // rows read together
        for (int64_t first = 0; first < outputs; first += strip) {
          for (int64_t k = 0; k < size; k += kRows) {
            const int64_t count = std::min<int64_t>(kRows, size - k);
            for (int64_t o = first; o < std::min(first + strip, outputs); ++o) {
              for (int64_t r = 0; r < count; ++r) {
                to[k * outputs + o * count + r] = static_cast<T>(from[o * depth + k + r]);
              }
            }
          }
        }
      }
    });
  }

  const int64_t K, in_group, outputs, block;
  const Buffer<T> packed;
};

class BackwardHalves {
 public:
  static constexpr int64_t kBytes = 768 << 10; // counted in float32

  BackwardHalves(const Geometry& g, int64_t block, const Half* weight)
      : K(g.K()), in_group(g.C / g.groups), outputs(g.O / g.groups), block(block),
        lines(whole_lines(outputs)), packed(g.C * K * lines) {
    // Transpose to [group][row][output].
    const int64_t depth = in_group * K;
    at::parallel_for(0, ceil_div(g.C * K, kLine), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t first = 0; first < outputs; first += kLine) {
          const int64_t last = std::min(first + kLine, outputs);
          for (int64_t row = i * kLine; row < std::min((i + 1) * kLine, g.C * K); ++row) {
            const Half* from = weight + row / depth * outputs * depth + row % depth;
            for (int64_t o = first; o < last; ++o) {
              packed.get()[row * lines + o] = from[o * depth];
            }
          }
        }
      }
    });
  }

  class Thread {
   public:
    Thread(const BackwardHalves& of, int64_t positions, bool of_weight)
        : of(of), pitch(positions), across(of_weight ? ceil_div(of.outputs, 16) * 16 : 0),
          along(of.lines / 2 * pitch), transposed(across * pitch / 2), made(of.K * pitch),
          u(of.block * of.K * pitch) {}
    void enter(const Half* grad_y, int64_t stride, int64_t columns) {
      this->columns = columns;
      Pair* to = along.get();
      for (int64_t o = 0; o < of.outputs; o += 2, to += pitch) {
        const Half *const row = grad_y + o * stride, *const below = row + stride;
        for (int64_t q = 0; q < columns; ++q) {
          to[q] = row[q].x | (o + 1 < of.outputs ? Pair(below[q].x) << 16 : 0);
        }
        std::fill(to + columns, to + pitch, 0);
      }
      for (int64_t first = 0; across && first < columns; first += kLine) {
        for (int64_t o = 0; o < of.outputs; ++o) {
          const Half* const row = grad_y + o * stride + first;
          to = transposed.get() + first / 2 * across + o;
          for (int64_t q = 0; q < kLine; q += 2, to += across) {
            const int64_t left = columns - first - q;
            *to = (left > 0 ? row[q].x : 0) | (left > 1 ? Pair(row[q + 1].x) << 16 : 0);
          }
        }
      }
    }
    void multiply(int64_t group, int64_t first, int64_t count, float* grad) const {
      multiply_halves(count * of.K, columns, of.lines,
                      of.packed.get() + (group * of.in_group + first) * of.K * of.lines, of.lines,
                      along.get(), pitch, grad, pitch, false);
    }
    float* features(int64_t) const {
      return made.get();
    }
    void keep(int64_t i) const {
      for (int64_t k = 0; k < of.K; ++k) {
        Half* const to = u.get() + (i * of.K + k) * pitch;
        store_halves(made.get() + k * pitch, columns, to);
        std::fill(to + columns, to + whole_lines(columns), Half(0, Half::from_bits()));
      }
    }
    void add_weight(int64_t count, float* out, int64_t stride) const {
      multiply_halves(count * of.K, across, whole_lines(columns), u.get(), pitch, transposed.get(),
                      across, out, stride, true);
    }

   private:
    const BackwardHalves& of;
    const int64_t pitch, across;
    int64_t columns = 0;
    Buffer<Pair> along, transposed;
    Buffer<float> made;
    Buffer<Half> u;
    HalvesScope scope;
  };

 private:
  const int64_t K, in_group, outputs, block, lines;
  const Buffer<Half> packed;
};

} // namespace
} // namespace rfa
