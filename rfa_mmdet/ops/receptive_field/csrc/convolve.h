// Convolution of windows whose weighed values are made tile by tile: what forward passes share.
//
// It goes through the output positions in tiles; for a block of channels, the K weighed features of
// each are written into a buffer that stays in cache, and one matrix product consumes it.
#pragma once

#include <ATen/Parallel.h>

#include <deque>

#include "forward_products.h"
#include "windows.h"

namespace rfa {
namespace {

constexpr int64_t kOutputBytes = 320 << 10; // of a tile's outputs, which are added to repeatedly

// Channels a block: as many as fit the buffer, but at least `least` blocks in all if possible.
template <typename T>
int64_t channel_block(const Geometry& g, int64_t positions, int64_t bytes, int64_t least) {
  const int64_t in_group = g.C / g.groups;
  const int64_t fit = bytes / (g.K() * positions * static_cast<int64_t>(sizeof(T)));
  int64_t block = std::clamp<int64_t>(fit, 1, in_group);
  const int64_t wanted = ceil_div(least, g.groups); // blocks a group
  block = std::clamp<int64_t>(block, 1, std::max<int64_t>(1, in_group / wanted));
  return ceil_div(in_group, ceil_div(in_group, block)); // even ones
}

// `make_weigher(positions)` gives each thread an object that writes the weighed features. For tiles
// of up to `positions`, it is told of each one by `enter(b, tile)`, and of each channel of that by
// `enter_channel(c)`; then asked, for runs of the tile's positions, to
// `write(patch, pitch, start, vectors, out, out_pitch)` from (K, vectors) of the window to as many
// of the features.
template <typename Products, typename E, typename MakeWeigher>
void convolve_by(const Geometry& g, const E* x, const E* weight, const E* bias, E* y,
                 const MakeWeigher& make_weigher) {
  using T = Compute<E>;
  const int64_t in_group = g.C / g.groups, outputs = g.O / g.groups;
  const int64_t threads = at::get_num_threads(), area = g.h * g.w;
  const int64_t wanted =
      std::clamp<int64_t>(kOutputBytes / (outputs * static_cast<int64_t>(sizeof(T))), 96,
                          tile_positions<T>(g));
  const auto tiles = split_map(g, wanted, std::max<int64_t>(1, ceil_div(threads, g.B)));
  const int64_t count = tiles.size(), positions = whole_lines(largest_tile<T>(tiles));
  // By what is wanted, not by what the number of threads makes of it: the order of sums, and so
  // every bit of the output, is the same for any number.
  const int64_t block = channel_block<T>(g, wanted, Products::kBytes, 1);
  const int64_t blocks = ceil_div(in_group, block);
  const Products products(g, block, weight, bias);
  // So many small tiles go through the weight together: it is read from memory once for all.
  const int64_t chunk = std::max<int64_t>(1, wanted / positions);

  at::parallel_for(0, g.B * count, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    std::deque<typename Products::Thread> of_tiles; // it moves nothing
    for (int64_t i = 0; i < std::min(chunk, end - begin); ++i) {
      of_tiles.emplace_back(products, positions);
    }
    auto weigher = make_weigher(positions);
    int64_t entered = -1;
    for (int64_t start = begin; start < end; start += chunk) {
      for (int64_t part = 0; part < g.groups * blocks; ++part) {
        const int64_t group = part / blocks, first = part % blocks * block;
        const int64_t size = std::min(block, in_group - first);
        for (int64_t task = start; task < std::min(end, start + chunk); ++task) {
          const int64_t b = task / count;
          const Tile& tile = tiles[task % count];
          auto& product = of_tiles[task - start];
          product.enter(tile.positions());
          if (task != entered) {
            weigher.enter(b, tile);
            entered = task;
          }
          E* const out = y + (b * g.O + group * outputs) * area + tile.start(g);
          for (int64_t i = 0; i < size; ++i) {
            const int64_t channel = group * in_group + first + i;
            windows.load(tile, x + (b * g.C + channel) * g.H * g.W);
            weigher.enter_channel(channel);
            product.write(i, size, [&](int64_t from, int64_t vectors, T* to, int64_t pitch) {
              weigher.write(windows.patches() + from, windows.pitch(), from, vectors, to, pitch);
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

template <typename E, typename MakeWeigher>
void convolve(const Geometry& g, const E* x, const E* weight, const E* bias, E* y,
              const MakeWeigher& make_weigher) {
  if constexpr (std::is_same_v<E, Half>) {
    if (can_multiply_halves()) {
      convolve_by<ForwardHalves>(g, x, weight, bias, y, make_weigher);
      return;
    }
  }
  convolve_by<ForwardProducts<E>>(g, x, weight, bias, y, make_weigher);
}

} // namespace
} // namespace rfa
