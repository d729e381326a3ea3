// The backward pass of convolve.h: from the gradient of the output to those of the features.
//
// Each thread has channels of its own: no sum crosses threads, so that results do not depend on
// their number, and what each tile of grad_y needs is packed once.
#pragma once

#include <ATen/Parallel.h>

#include "convolve.h"
#include "gemm.h"
#include "products.h"
#include "windows.h"

namespace rfa {
namespace {

// As pack_rows, for the transposed weight: [group][block][block of rows of it][output][row].
template <typename E>
void pack_columns(const Geometry& g, int64_t block, const E* weight, Compute<E>* out) {
  const int64_t depth = g.C / g.groups * g.K(), rows = g.O / g.groups;
  const int64_t blocks = ceil_div(depth, block);
  at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, start = i % blocks * block;
      const int64_t size = std::min(block, depth - start);
      const E* from = weight + group * rows * depth + start;
      Compute<E>* to = out + group * rows * depth + start * rows;
      for (int64_t k = 0; k < size; k += kRows) {
        const int64_t count = std::min<int64_t>(kRows, size - k);
        for (int64_t o = 0; o < rows; ++o) {
          for (int64_t r = 0; r < count; ++r) {
            to[k * rows + o * count + r] = static_cast<Compute<E>>(from[o * depth + k + r]);
          }
        }
      }
    }
  });
}

// grad_y's rows of a tile, (outputs, positions), as panels along positions and along outputs.
template <typename E>
void pack_gradient(const E* from, int64_t row_stride, int64_t outputs,
                   const Panels<Compute<E>>& positions, Compute<E>* along,
                   const Panels<Compute<E>>* across, Compute<E>* transposed) {
  using T = Compute<E>;
  for (int64_t panel = 0; panel < positions.count; ++panel) {
    const int64_t width = positions.width_of(panel), start = positions.start(panel);
    const int64_t real = std::min(width, positions.columns - start);
    T* to = along + start * outputs;
    for (int64_t o = 0; o < outputs; ++o, to += width) {
      const E* row = from + o * row_stride + start;
      for (int64_t q = 0; q < real; ++q) {
        to[q] = static_cast<T>(row[q]);
      }
      std::fill(to + real, to + width, T(0));
    }
  }
  if (!across) {
    return;
  }
  for (int64_t panel = 0; panel < across->count; ++panel) {
    const int64_t width = across->width_of(panel), start = across->start(panel);
    T* to = transposed + start * positions.columns;
    constexpr int64_t step = 16;
    for (int64_t q = 0; q < positions.columns; q += step) {
      const int64_t many = std::min(step, positions.columns - q);
      for (int64_t o = 0; o < width; ++o) {
        if (start + o < outputs) {
          const E* row = from + (start + o) * row_stride + q;
          for (int64_t i = 0; i < many; ++i) {
            to[(q + i) * width + o] = static_cast<T>(row[i]);
          }
        } else {
          for (int64_t i = 0; i < many; ++i) {
            to[(q + i) * width + o] = T(0);
          }
        }
      }
    }
  }
}

// What the gradient of one channel's features, before the activation, means for a tile.
//
// `grad` is (K, positions), zero past the tile's; `feature` (K, K) by which the window became the
// features; `constant` (positions), unless null, is added to the gradient of each value of the
// window. Added to:
// the sums over positions of `grad` times the window, (K, K); and the gradient of a plane of x,
// unless it is null.
template <typename E>
void absorb(const Tile& tile, Windows<E>& windows, int64_t K, const Compute<E>* grad,
            int64_t pitch, const Compute<E>* feature, const Compute<E>* constant,
            double* products, Compute<E>* mixed, Compute<E>* grad_plane) {
  const int64_t vectors = ceil_div(tile.positions(), Vec<Compute<E>>::size());
  if (products) {
    multiply(grad, pitch, windows.patches(), windows.pitch(), vectors, K, products, false);
  }
  if (grad_plane) {
    for (int64_t k = 0; constant && k < K; ++k) {
      std::copy_n(constant, tile.positions(), mixed + k * windows.pitch());
    }
    mix<Compute<E>>(grad, pitch, vectors, K, feature, 1, K, constant != nullptr, nullptr, mixed,
                    windows.pitch());
    windows.add(tile, mixed, grad_plane);
  }
}

// How the channels are divided into tasks, blocks of them; at least `least` if possible.
template <typename T>
struct Blocks {
  int64_t wanted, block, blocks, tasks; // positions a tile; channels a block; blocks a group

  Blocks(const Geometry& g, int64_t least) {
    const int64_t size = sizeof(T) * (g.O / g.groups), in_group = g.C / g.groups;
    wanted = std::clamp<int64_t>(kOutputBytes / size, 96, 640);
    block = channel_block<T>(g, wanted, kBufferBytes, least);
    blocks = ceil_div(in_group, block);
    tasks = g.groups * blocks;
  }
};

// `make_weigher(positions)` gives each thread an object that knows how the features were weighed.
// It is told of tiles and channels as in convolve.h, and of the slot by `enter_slot(slot)`; then
// asked, for a tile, to turn the gradient of the weighed features in `grad`, (K, positions), into
// that of the features before the activation, to write the weighed features to `u`, and to add the
// sums of the gradient to `shift` (K): `backward(patch, pitch, vectors, u, grad, grad_pitch,
// shift)`. `feature()` and `constant()` are what `absorb` takes; `leave(c)` ends a channel.
//
// A slot is a fixed part of the channels, which one thread goes through: there are `slots`, or, if
// that is 0, as many as there are tasks for the threads.
template <typename E, typename MakeWeigher>
void convolve_backward(const Geometry& g, const E* grad_y, const E* x, const E* weight,
                       const Gradients<Compute<E>>& grads, int64_t slots,
                       const MakeWeigher& make_weigher) {
  using T = Compute<E>;
  const int64_t K = g.K(), in_group = g.C / g.groups, outputs = g.O / g.groups;
  const int64_t area = g.h * g.w;
  const Blocks<T> plan(g, slots ? slots : at::get_num_threads());
  const int64_t tasks = plan.tasks, parts = slots ? slots : tasks;
  const auto tiles = split_map(g, plan.wanted, 1);
  const int64_t positions = largest_tile<T>(tiles), block = plan.block, blocks = plan.blocks;
  Buffer<T> packed(g.O * in_group * K);
  pack_columns(g, block * K, weight, packed.get());
  const Panels<T> across(outputs);

  at::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t end_part) {
    const int64_t begin = first_part * tasks / parts, end = end_part * tasks / parts;
    if (begin == end) {
      return;
    }
    Windows<E> windows(g, tiles);
    Buffer<T> along(outputs * positions), transposed(across.padded() * positions);
    Buffer<T> u(block * K * positions), grad(block * K * positions), mixed(K * windows.pitch());
    auto weigher = make_weigher(positions);
    const int64_t per_channel = K + K * K;
    Buffer<double> sums((end - begin) * block * per_channel);
    for (int64_t b = 0; b < g.B; ++b) {
      for (const auto& tile : tiles) {
        const Panels<T> panels(tile.positions());
        weigher.enter(b, tile);
        int64_t packed_group = -1;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task / blocks, first = task % blocks * block;
          const int64_t count = std::min(block, in_group - first);
          if (group != packed_group) {
            const E* from = grad_y + (b * g.O + group * outputs) * area + tile.start(g);
            pack_gradient<E>(from, area, outputs, panels, along.get(),
                             grads.weight ? &across : nullptr, transposed.get());
            packed_group = group;
          }
          weigher.enter_slot(((task + 1) * parts - 1) / tasks);
          const T* a = packed.get() + (group * in_group + first) * K * outputs;
          gemm<T>(count * K, outputs, {a, 0}, along.get(), panels, grad.get(), positions, false,
                  nullptr, true);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t c = group * in_group + first + i;
            const int64_t plane = (b * g.C + c) * g.H * g.W;
            windows.load(tile, x + plane);
            weigher.enter_channel(c);
            T* const gc = grad.get() + i * K * positions;
            double* const sum = sums.get() + ((task - begin) * block + i) * per_channel;
            weigher.backward(windows.patches(), windows.pitch(), panels.vectors,
                             u.get() + i * K * positions, gc, positions, sum);
            absorb<E>(tile, windows, K, gc, positions, weigher.feature(), weigher.constant(),
                      grads.products ? sum + K : nullptr, mixed.get(),
                      grads.x ? grads.x + plane : nullptr);
          }
          if (grads.weight) {
            T* out = grads.weight + (group * in_group + first) * K * grads.weight_stride;
            gemm<T>(count * K, tile.positions(), {u.get(), positions}, transposed.get(), across,
                    out, grads.weight_stride, true, nullptr, true);
          }
        }
      }
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, first = task % blocks * block;
      for (int64_t i = 0; i < std::min(block, in_group - first); ++i) {
        const int64_t c = group * in_group + first + i;
        weigher.leave(c);
        if (grads.products) {
          const double* sum = sums.get() + ((task - begin) * block + i) * per_channel;
          std::copy(sum, sum + K, grads.shift + c * K);
          std::copy(sum + K, sum + per_channel, grads.products + c * K * K);
        }
      }
    }
  });
}
} // namespace
} // namespace rfa
