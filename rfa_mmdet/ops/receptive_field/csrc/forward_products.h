// The matrix product of a forward pass, weight times weighted features. One class uses gemm.h in
// the compute type, the other bfloat16.h.
//
// Each class holds the packed weight. Its `Thread` holds the features of a block of channels for a
// tile. `write` stores a channel's features, which its argument computes; `multiply` adds the block
// to the sums; `finish` writes them to `out`, with rows `stride` apart.
#pragma once

#include <ATen/Parallel.h>

#include "bfloat16.h"
#include "gemm.h"
#include "kernels.h"

namespace rfa {
namespace {

template <typename T>
void add_bias(const T* sums, int64_t pitch, const T* bias, int64_t rows, int64_t columns, Half* out,
              int64_t stride) {
  for (int64_t o = 0; o < rows; ++o) {
    for (int64_t q = 0; q < columns; ++q) {
      out[o * stride + q].x = rounded_bits(sums[o * pitch + q] + bias[o]) >> 16;
    }
  }
}

template <typename E>
Buffer<Compute<E>> bias_of(const Geometry& g, const E* bias) {
  Buffer<Compute<E>> out(g.O);
  for (int64_t o = 0; bias && o < g.O; ++o) {
    out.get()[o] = static_cast<Compute<E>>(bias[o]);
  }
  return out;
}

template <typename E>
class ForwardProducts {
  using T = Compute<E>;
  static constexpr bool direct = std::is_same_v<E, T>;

 public:
  static constexpr int64_t kBytes = 192 << 10; // of features, which must fit in L2 with the rest

  ForwardProducts(const Geometry& g, int64_t block, const E* weight, const E* bias)
      : K(g.K()), in_group(g.C / g.groups), outputs(g.O / g.groups), block(block),
        packed(g.O * in_group * K, false), bias(bias_of(g, bias)) {
    pack(g, weight);
  }

  class Thread {
   public:
    Thread(const ForwardProducts& of, int64_t positions)
        : of(of), pitch(positions), panels(1), features(of.block * of.K * positions),
          sums(direct ? 0 : of.outputs * positions) {}
    void enter(int64_t columns) {
      panels = Panels<T>(columns);
    }
    template <typename F>
    void write(int64_t i, int64_t count, F&& make) {
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t width = panels.width_of(panel), from = panels.start(panel);
        make(from, panels.vectors_of(panel),
             features.get() + from * count * of.K + i * of.K * width, width);
      }
    }
    void multiply(int64_t group, int64_t first, int64_t count, E* out, int64_t stride) {
      const T* const a = of.packed.get() + (group * of.in_group + first) * of.K * of.outputs;
      T* c = sums.get();
      int64_t ldc = pitch;
      if constexpr (direct) {
        c = out;
        ldc = stride;
      }
      gemm<T>(of.outputs, count * of.K, {a, 0}, features.get(), panels, c, ldc, first > 0,
              direct && !first ? of.bias.get() + group * of.outputs : nullptr, false);
    }
    void finish(int64_t group, E* out, int64_t stride) const {
      if constexpr (!direct) {
        add_bias(sums.get(), pitch, of.bias.get() + group * of.outputs, of.outputs, panels.columns,
                 out, stride);
      }
    }

   private:
    const ForwardProducts& of;
    const int64_t pitch;
    Panels<T> panels;
    Buffer<T> features, sums;
  };

 private:
  // Pack weight (O, C / groups * K) to [group][block of columns][block of rows][column][row], the
  // order in which products of blocks of columns read it.
  void pack(const Geometry& g, const E* weight) const {
    const int64_t depth = in_group * K, step = block * K, blocks = ceil_div(outputs, kRows);
    at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, row = i % blocks * kRows;
        const int64_t count = std::min<int64_t>(kRows, outputs - row);
        const E* from = weight + (group * outputs + row) * depth;
        for (int64_t start = 0; start < depth; start += step) {
          const int64_t size = std::min(step, depth - start);
          T* to = packed.get() + group * outputs * depth + start * outputs + row * size;
          for (int64_t k = 0; k < size; ++k) {
            for (int64_t r = 0; r < count; ++r) {
              to[k * count + r] = static_cast<T>(from[r * depth + start + k]);
            }
          }
        }
      }
    });
  }

  const int64_t K, in_group, outputs, block;
  const Buffer<T> packed, bias;
};

class ForwardHalves {
 public:
  static constexpr int64_t kBytes = 768 << 10; // counted in float32

  ForwardHalves(const Geometry& g, int64_t block, const Half* weight, const Half* bias)
      : K(g.K()), outputs(g.O / g.groups), block(block), depth(whole_lines(block * K)),
        blocks(ceil_div(g.C / g.groups, block)), packed(g.O * blocks * depth),
        bias(bias_of(g, bias)) {
    // [group][block of columns][row][column]
    const int64_t columns = g.C / g.groups * K;
    at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i % blocks * block * K, size = std::min(block * K, columns - start);
        for (int64_t o = 0; o < outputs; ++o) {
          std::copy_n(weight + (i / blocks * outputs + o) * columns + start, size,
                      packed.get() + (i * outputs + o) * depth);
        }
      }
    });
  }

  class Thread {
   public:
    Thread(const ForwardHalves& of, int64_t positions)
        : of(of), pitch(positions), made(of.K * kRun), pairs(of.depth / 2 * positions),
          sums(of.outputs * positions) {}
    void enter(int64_t columns) {
      this->columns = columns;
    }
    template <typename F>
    void write(int64_t i, int64_t, F&& make) {
      for (int64_t from = 0; from < columns; from += kRun) {
        const int64_t vectors = ceil_div(std::min(kRun, columns - from), Vec<float>::size());
        make(from, vectors, made.get(), kRun);
        store_pairs(made.get(), kRun, i * of.K, of.K, vectors * Vec<float>::size(),
                    pairs.get() + from, pitch);
      }
    }
    void multiply(int64_t group, int64_t first, int64_t count, Half*, int64_t) {
      const int64_t rows = count * of.K, lines = whole_lines(rows);
      std::fill(pairs.get() + ceil_div(rows, 2) * pitch, pairs.get() + lines / 2 * pitch, 0);
      const int64_t index = group * of.blocks + first / of.block;
      multiply_halves(of.outputs, columns, lines, of.packed.get() + index * of.outputs * of.depth,
                      of.depth, pairs.get(), pitch, sums.get(), pitch, first > 0);
    }
    void finish(int64_t group, Half* out, int64_t stride) const {
      add_bias(sums.get(), pitch, of.bias.get() + group * of.outputs, of.outputs, columns, out,
               stride);
    }

   private:
    static constexpr int64_t kRun = 64; // positions converted to pairs at a time
    const ForwardHalves& of;
    const int64_t pitch;
    int64_t columns = 0;
    Buffer<float> made;
    Buffer<Pair> pairs;
    Buffer<float> sums;
    HalvesScope scope;
  };

 private:
  const int64_t K, outputs, block, depth, blocks;
  const Buffer<Half> packed;
  const Buffer<float> bias;
};

} // namespace
} // namespace rfa
