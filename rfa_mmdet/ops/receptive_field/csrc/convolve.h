// Convolution of weighted features, computed tile by tile: shared by all forward passes.
//
// For each tile of output positions and each block of channels, the K weighted features of each
// channel go into a buffer that stays in cache, and one matrix product consumes it.
#pragma once

#include <ATen/Parallel.h>

#include <deque>

#include "forward_products.h"
#include "windows.h"

namespace rfa {
namespace {

constexpr int64_t kOutputBytes = 320 << 10; // of a tile's outputs, which stay in cache

// Channels per block: as many as fit in the buffer, but at least `least` blocks if possible.
template <typename T>
int64_t channel_block(const Geometry& g, int64_t positions, int64_t bytes, int64_t least) {
  const int64_t in_group = g.C / g.groups;
  const int64_t fit = bytes / (g.K() * positions * static_cast<int64_t>(sizeof(T)));
  int64_t block = std::clamp<int64_t>(fit, 1, in_group);
  const int64_t wanted = ceil_div(least, g.groups); // blocks per group
  block = std::clamp<int64_t>(block, 1, std::max<int64_t>(1, in_group / wanted));
  return ceil_div(in_group, ceil_div(in_group, block)); // even blocks
}

// `make_source(positions)` creates each thread's source of weighted features, for tiles of up to
// `positions`. `enter(b, tile)` selects a tile, `enter_channel(c)` a channel. Then `write(patch,
// pitch, start, vectors, out, out_pitch)` computes the features of a run of the tile's positions,
// (K, vectors), from the same values of the windows.
template <typename Products, typename E, typename MakeSource>
void convolve_by(const Geometry& g, const E* x, const E* weight, const E* bias, E* y,
                 const MakeSource& make_source) {
  using T = Compute<E>;
  const int64_t in_group = g.C / g.groups, outputs = g.O / g.groups;
  const int64_t threads = at::get_num_threads(), area = g.h * g.w;
  const int64_t wanted =
      std::clamp<int64_t>(kOutputBytes / (outputs * static_cast<int64_t>(sizeof(T))), 96,
                          tile_positions<T>(g));
  const auto tiles = split_map(g, wanted, std::max<int64_t>(1, ceil_div(threads, g.B)));
  const int64_t count = tiles.size(), positions = whole_lines(largest_tile<T>(tiles));
  // Independent of the number of threads, and with it the order of sums and every bit of the
  // output.
  const int64_t block = channel_block<T>(g, wanted, Products::kBytes, 1);
  const int64_t blocks = ceil_div(in_group, block);
  const Products products(g, block, weight, bias);
  // This many small tiles share each block of the weight, so that it is read only once.
  const int64_t chunk = std::max<int64_t>(1, wanted / positions);

  at::parallel_for(0, g.B * count, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    std::deque<typename Products::Thread> tile_products; // does not move elements
    for (int64_t i = 0; i < std::min(chunk, end - begin); ++i) {
      tile_products.emplace_back(products, positions);
    }
    auto source = make_source(positions);
    int64_t entered = -1;
    for (int64_t start = begin; start < end; start += chunk) {
      for (int64_t part = 0; part < g.groups * blocks; ++part) {
        const int64_t group = part / blocks, first = part % blocks * block;
        const int64_t size = std::min(block, in_group - first);
        for (int64_t task = start; task < std::min(end, start + chunk); ++task) {
          const int64_t b = task / count;
          const Tile& tile = tiles[task % count];
          auto& product = tile_products[task - start];
          product.enter(tile.positions());
          if (task != entered) {
            source.enter(b, tile);
            entered = task;
          }
          E* const out = y + (b * g.O + group * outputs) * area + tile.start(g);
          for (int64_t i = 0; i < size; ++i) {
            const int64_t channel = group * in_group + first + i;
            windows.load(tile, x + (b * g.C + channel) * g.H * g.W);
            source.enter_channel(channel);
            product.write(i, size, [&](int64_t from, int64_t vectors, T* to, int64_t pitch) {
              source.write(windows.patches() + from, windows.pitch(), from, vectors, to, pitch);
            });
          }
          product.multiply(group, first, size, out, area);
          if (first + size == in_group) {
            product.finish(group, out, area);
          }
        }
      }
    }
  });
}

template <typename E, typename MakeSource>
void convolve(const Geometry& g, const E* x, const E* weight, const E* bias, E* y,
              const MakeSource& make_source) {
  if constexpr (std::is_same_v<E, Half>) {
    if (can_multiply_halves()) {
      convolve_by<ForwardHalves>(g, x, weight, bias, y, make_source);
      return;
    }
  }
  convolve_by<ForwardProducts<E>>(g, x, weight, bias, y, make_source);
}

} // namespace
} // namespace rfa
