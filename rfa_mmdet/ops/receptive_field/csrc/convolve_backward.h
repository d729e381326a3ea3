// The backward pass of convolve.h: from the gradient of the output to those of the features.
//
// Each thread has its own channels. So no sum crosses threads, results do not depend on their
// number, and each tile of grad_y is packed once per thread.
#pragma once

#include <ATen/Parallel.h>

#include <deque>

#include "backward_products.h"
#include "convolve.h"
#include "products.h"
#include "windows.h"

namespace rfa {
namespace {

// Propagates the gradient before the activation, for one channel and tile.
//
// `grad` (K, positions) is zero past the end of the tile. `feature` (K, K) maps windows to
// features. `constant` (positions), if not null, is added to the gradient of each value of the
// window. Adds to `products` (K, K) the sums over positions of `grad` times the window, and to
// `grad_plane` the gradient of a plane of x, unless they are null.
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

// Division of the channels into tasks (blocks of channels), at least `least` if possible.
template <typename T>
struct Blocks {
  int64_t wanted, block, blocks, tasks; // positions per tile, channels per block, blocks per group

  Blocks(const Geometry& g, int64_t bytes, int64_t least) {
    const int64_t size = sizeof(T) * (g.O / g.groups), in_group = g.C / g.groups;
    wanted = std::clamp<int64_t>(kOutputBytes / size, 96, 640);
    block = channel_block<T>(g, wanted, bytes, least);
    blocks = ceil_div(in_group, block);
    tasks = g.groups * blocks;
  }
};

// `make_source(positions)` creates each thread's source of weighted features. Tiles and channels
// are selected as in convolve.h, and slots by `enter_slot(slot)`. For a tile, `backward(patch,
// pitch, vectors, u, grad, grad_pitch, shift)` replaces the gradient of the weighted features in
// `grad`, (K, positions), by that of the features before the activation, writes the weighted
// features to `u`, and adds the sums of the gradient to `shift` (K). `feature()` and `constant()`
// return arguments of `absorb`; `leave(c)` ends a channel.
//
// A slot is a fixed part of the channels that one thread processes. There are `slots` of them, or,
// if that is 0, one per task.
template <typename Products, typename E, typename MakeSource>
void convolve_backward_by(const Geometry& g, const E* grad_y, const E* x, const E* weight,
                          const Gradients<Compute<E>>& grads, int64_t slots,
                          const MakeSource& make_source) {
  using T = Compute<E>;
  const int64_t K = g.K(), in_group = g.C / g.groups, outputs = g.O / g.groups;
  const int64_t area = g.h * g.w;
  const Blocks<T> plan(g, Products::kBytes, slots ? slots : at::get_num_threads());
  const int64_t tasks = plan.tasks, parts = slots ? slots : tasks;
  const auto tiles = split_map(g, plan.wanted, 1);
  const int64_t positions = whole_lines(largest_tile<T>(tiles));
  const int64_t block = plan.block, blocks = plan.blocks;
  const Products products(g, block, weight);
  const int64_t count = tiles.size(), all = g.B * count;
  const int64_t chunk = std::clamp<int64_t>(plan.wanted / positions, 1, all); // as in convolve.h

  at::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t end_part) {
    const int64_t begin = first_part * tasks / parts, end = end_part * tasks / parts;
    if (begin == end) {
      return;
    }
    Windows<E> windows(g, tiles);
    std::deque<typename Products::Thread> tile_products;
    for (int64_t i = 0; i < chunk; ++i) {
      tile_products.emplace_back(products, positions, grads.weight);
    }
    Buffer<T> grad(block * K * positions), mixed(K * windows.pitch());
    auto source = make_source(positions);
    const int64_t per_channel = K + K * K;
    Buffer<double> sums((end - begin) * block * per_channel);
    int64_t entered = -1;
    for (int64_t start = 0; start < all; start += chunk) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / blocks, first = task % blocks * block;
        const int64_t size = std::min(block, in_group - first);
        source.enter_slot(((task + 1) * parts - 1) / tasks);
        for (int64_t place = start; place < std::min(all, start + chunk); ++place) {
          const int64_t b = place / count;
          const Tile& tile = tiles[place % count];
          const int64_t vectors = ceil_div(tile.positions(), Vec<T>::size());
          auto& product = tile_products[place - start];
          if (task == begin || first == 0) { // a new group
            product.enter(grad_y + (b * g.O + group * outputs) * area + tile.start(g), area,
                          tile.positions());
          }
          if (place != entered) {
            source.enter(b, tile);
            entered = place;
          }
          product.multiply(group, first, size, grad.get());
          for (int64_t i = 0; i < size; ++i) {
            const int64_t c = group * in_group + first + i;
            const int64_t plane = (b * g.C + c) * g.H * g.W;
            windows.load(tile, x + plane);
            source.enter_channel(c);
            T* const gc = grad.get() + i * K * positions;
            double* const sum = sums.get() + ((task - begin) * block + i) * per_channel;
            source.backward(windows.patches(), windows.pitch(), vectors, product.features(i), gc,
                            positions, sum);
            product.keep(i);
            absorb<E>(tile, windows, K, gc, positions, source.feature(), source.constant(),
                      grads.products ? sum + K : nullptr, mixed.get(),
                      grads.x ? grads.x + plane : nullptr);
          }
          if (grads.weight) {
            product.add_weight(
                size, grads.weight + (group * in_group + first) * K * grads.weight_stride,
                grads.weight_stride);
          }
        }
      }
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, first = task % blocks * block;
      for (int64_t i = 0; i < std::min(block, in_group - first); ++i) {
        const int64_t c = group * in_group + first + i;
        source.leave(c);
        if (grads.products) {
          const double* sum = sums.get() + ((task - begin) * block + i) * per_channel;
          std::copy(sum, sum + K, grads.shift + c * K);
          std::copy(sum + K, sum + per_channel, grads.products + c * K * K);
        }
      }
    }
  });
}

template <typename E, typename MakeSource>
void convolve_backward(const Geometry& g, const E* grad_y, const E* x, const E* weight,
                       const Gradients<Compute<E>>& grads, int64_t slots,
                       const MakeSource& make_source) {
  if constexpr (std::is_same_v<E, Half>) {
    if (can_multiply_halves()) {
      convolve_backward_by<BackwardHalves>(g, grad_y, x, weight, grads, slots, make_source);
      return;
    }
  }
  convolve_backward_by<BackwardProducts<E>>(g, grad_y, x, weight, grads, slots, make_source);
}

} // namespace
} // namespace rfa
