// Convolution of windows whose weighed values are made tile by tile: what forward passes share.
//
// It goes through the output positions in tiles; for a block of channels, the K weighed features of
// each are written into a buffer that stays in cache, and one matrix product consumes it.
#pragma once

#include <ATen/Parallel.h>

#include "gemm.h"
#include "windows.h"

namespace rfa {
namespace {

constexpr int64_t kBufferBytes = 192 << 10; // of weighed features: fits beside the rest in L2
constexpr int64_t kOutputBytes = 320 << 10; // of a tile's outputs, which are added to repeatedly

// Copies weight (O, C / groups * K) so that the products of a block of `block` of its columns find
// it packed: forward [group][block of columns][block of rows][column][row].
template <typename E>
void pack_rows(const Geometry& g, int64_t block, const E* weight, Compute<E>* out) {
  const int64_t depth = g.C / g.groups * g.K(), rows = g.O / g.groups;
  const int64_t blocks = ceil_div(rows, kRows);
  at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, row = i % blocks * kRows;
      const int64_t count = std::min<int64_t>(kRows, rows - row);
      const E* from = weight + (group * rows + row) * depth;
      for (int64_t start = 0; start < depth; start += block) {
        const int64_t size = std::min(block, depth - start);
        Compute<E>* to = out + group * rows * depth + start * rows + row * size;
        for (int64_t k = 0; k < size; ++k) {
          for (int64_t r = 0; r < count; ++r) {
            to[k * count + r] = static_cast<Compute<E>>(from[r * depth + start + k]);
          }
        }
      }
    }
  });
}

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
template <typename E, typename MakeWeigher>
void convolve(const Geometry& g, const E* x, const E* weight, const E* bias, E* y,
              const MakeWeigher& make_weigher) {
  using T = Compute<E>;
  const int64_t K = g.K(), in_group = g.C / g.groups, outputs = g.O / g.groups;
  const int64_t threads = at::get_num_threads(), area = g.h * g.w;
  const int64_t wanted =
      std::clamp<int64_t>(kOutputBytes / (outputs * static_cast<int64_t>(sizeof(T))), 96,
                          tile_positions<T>(g));
  const auto tiles = split_map(g, wanted, std::max<int64_t>(1, ceil_div(threads, g.B)));
  const int64_t count = tiles.size(), positions = largest_tile<T>(tiles);
  // By what is wanted, not by what the number of threads makes of it: the order of sums, and so
  // every bit of the output, is the same for any number.
  const int64_t block = channel_block<T>(g, wanted, kBufferBytes, 1);
  Buffer<T> packed(g.O * in_group * K);
  pack_rows(g, block * K, weight, packed.get());
  Buffer<T> start(g.O);
  for (int64_t o = 0; bias && o < g.O; ++o) {
    start.get()[o] = static_cast<T>(bias[o]);
  }
  constexpr bool direct = std::is_same_v<E, T>;

  at::parallel_for(0, g.B * count, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> features(block * K * positions);
    auto weigher = make_weigher(positions);
    Buffer<T> sums(direct ? 0 : outputs * positions);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / count;
      const Tile& tile = tiles[task % count];
      const Panels<T> panels(tile.positions());
      weigher.enter(b, tile);
      for (int64_t group = 0; group < g.groups; ++group) {
        E* out = y + (b * g.O + group * outputs) * area + tile.start(g);
        T* c = sums.get();
        int64_t ldc = positions;
        if constexpr (direct) {
          c = out;
          ldc = area;
        }
        for (int64_t first = 0; first < in_group; first += block) {
          const int64_t size = std::min(block, in_group - first);
          for (int64_t i = 0; i < size; ++i) {
            const int64_t channel = group * in_group + first + i;
            windows.load(tile, x + (b * g.C + channel) * g.H * g.W);
            weigher.enter_channel(channel);
            for (int64_t panel = 0; panel < panels.count; ++panel) {
              const int64_t width = panels.width_of(panel), from = panels.start(panel);
              weigher.write(windows.patches() + from, windows.pitch(), from,
                            panels.vectors_of(panel),
                            features.get() + from * size * K + i * K * width, width);
            }
          }
          const T* a = packed.get() + (group * in_group + first) * K * outputs;
          gemm<T>(outputs, size * K, {a, 0}, features.get(), panels, c, ldc, first > 0,
                  first ? nullptr : start.get() + group * outputs, false);
        }
        if constexpr (!direct) {
          for (int64_t o = 0; o < outputs; ++o) {
            for (int64_t q = 0; q < tile.positions(); ++q) {
              out[o * area + q] = static_cast<E>(c[o * ldc + q]);
            }
          }
        }
      }
    }
  });
}

} // namespace
} // namespace rfa
