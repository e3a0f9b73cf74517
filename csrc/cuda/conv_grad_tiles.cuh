// Tiles of conv_grad: how they are filled from global memory, and the two ways to multiply them.
//
// A tile is kM rows of the anchor's channels and below them kN rows of (n, tap) columns, each row
// kPositions<T> neighbouring positions. Both operands lie along the positions, as in global memory:
// nothing is turned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tensor_cores.cuh"
#include "math/conv_grad.h"

namespace dpfast::cuda {

constexpr int kRowBytes = 64;
// Eight neighbouring rows start four banks apart, in some order: they are read without conflict,
// 16 bytes a thread or a word by each of four threads.
constexpr int kPitchBytes = 80;
template <class T>
constexpr int kPositions = kRowBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPitch = kPitchBytes / static_cast<int>(sizeof(T));

// n / divisor for 0 <= n < 2^31 (Granlund and Montgomery 1994, figure 4.1).
struct Divider {
  std::uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(std::uint32_t by) : divisor(by) {
    while ((std::uint64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<std::uint32_t>((((std::uint64_t{1} << shift) - by) << 32) / by + 1);
  }

  __device__ int divide(int n) const {
    const std::uint32_t value = static_cast<std::uint32_t>(n);
    const std::uint32_t high =
        static_cast<std::uint32_t>((std::uint64_t{multiplier} * value) >> 32);
    return static_cast<int>((high + value) >> shift);
  }
};

// One call as kernel parameters. Sizes within a sample fit 31 bits; the launcher checks that.
struct ConvTask {
  const void* anchor;
  const void* moving;
  float* out;
  float* anchor_sums;
  float* partials;       // [splits] times what out holds, where positions are split; else null
  double* sum_partials;  // [splits, images * m], likewise
  double* squares;       // [samples, square_parts], or null
  std::int64_t images;   // samples * groups
  int out_m_stride, out_n_stride;
  int groups, m, n, columns, taps;  // columns = n * taps
  int positions, split_positions;
  int splits, tiles_m, tiles_n, square_parts;
  int anchor_size[kConvAxes], moving_size[kConvAxes], kernel[kConvAxes];
  int stride[kConvAxes], padding[kConvAxes], dilation[kConvAxes];
  Divider by_taps, by_row, by_plane;  // the anchor's width, and width * height
  bool flip_taps;
  bool anchor_vectors;  // 16-byte loads of the anchor are aligned
};

// What a column adds to a position: bytes, and depth, height, width.
struct alignas(16) ConvColumn {
  int offset, depth, height, width;
};
constexpr int kOutside = -(1 << 30);  // a depth that lies outside of every tensor

__device__ inline ConvColumn make_column(const ConvTask& task, int index, int item) {
  if (index >= task.columns) return {0, kOutside, 0, 0};
  const int n = task.by_taps.divide(index);
  int tap = index - n * task.taps;
  ConvColumn column;
  column.width = tap % task.kernel[2] * task.dilation[2];
  tap /= task.kernel[2];
  column.height = tap % task.kernel[1] * task.dilation[1];
  column.depth = tap / task.kernel[1] * task.dilation[0];
  const int* size = task.moving_size;
  column.offset =
      (((n * size[0] + column.depth) * size[1] + column.height) * size[2] + column.width) * item;
  return column;
}

template <class T, int kM_, int kN_, int kThreads_>
struct ConvTile {
  using Value = T;
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kElements = (kM + kN) * kPitch<T>;
};

// Fills tiles. float32 goes to shared memory by asynchronous copies; of 16-bit values the columns
// (and an unaligned anchor) go through registers: 2 bytes cannot be copied asynchronously. Of
// these, a thread reads between begin() and end(), while the tile before is multiplied.
template <class Tile>
class ConvLoader {
  using T = typename Tile::Value;
  static constexpr int kK = kPositions<T>;
  static constexpr int kColumnsAtOnce = Tile::kThreads / kK;
  static constexpr int kGathers = Tile::kN / kColumnsAtOnce;
  static constexpr bool kAsync = sizeof(T) == 4;
  static_assert(Tile::kThreads % kK == 0 && Tile::kN % kColumnsAtOnce == 0 &&
                    Tile::kM % kColumnsAtOnce == 0,
                "no thread idles");

 public:
  __device__ ConvLoader(const ConvTask& task, const T* anchor, const T* moving, int rows, int end,
                        const ConvColumn* columns)
      : task_(task), anchor_(anchor), moving_(moving), rows_(rows), end_(end), columns_(columns) {}

  // Positions from `first` on.
  __device__ void begin(int first, T* tile) {
    if (task_.anchor_vectors) {
      copy_anchor<16>(first, tile);
    } else if constexpr (kAsync) {
      copy_anchor<4>(first, tile);
    }
    gather(first, tile + Tile::kM * kPitch<T>);
  }

  __device__ void end(int first, T* tile) {
    if constexpr (!kAsync) {
      T* mine = tile + (Tile::kM + threadIdx.x / kK) * kPitch<T> + threadIdx.x % kK;
#pragma unroll
      for (int i = 0; i < kGathers; ++i) mine[i * kColumnsAtOnce * kPitch<T>] = values_[i];
      if (!task_.anchor_vectors) {
        const int k = static_cast<int>(threadIdx.x) % kK;
        const int row = static_cast<int>(threadIdx.x) / kK;
        const T* from = anchor_ + static_cast<std::int64_t>(row) * task_.positions + (first + k);
#pragma unroll 8
        for (int i = 0; i < Tile::kM; i += kColumnsAtOnce) {
          T value = T(0.0f);
          if (first + k < end_ && row + i < rows_) {
            value = from[static_cast<std::int64_t>(i) * task_.positions];
          }
          tile[(row + i) * kPitch<T> + k] = value;
        }
      }
    }
  }

 private:
  // With 16 bytes, `end` lies between two copies: it is a whole number of them.
  template <int kBytes>
  __device__ void copy_anchor(int first, T* tile) {
    constexpr int kEach = kBytes / static_cast<int>(sizeof(T));
    constexpr int kCopies = kK / kEach;  // of a row
    constexpr int kRowsAtOnce = Tile::kThreads / kCopies;
    const int k = static_cast<int>(threadIdx.x) % kCopies * kEach;
    const int row = static_cast<int>(threadIdx.x) / kCopies;
    const bool inside = first + k < end_;
    const T* from = anchor_ + static_cast<std::int64_t>(row) * task_.positions + (first + k);
    const std::int64_t step = static_cast<std::int64_t>(kRowsAtOnce) * task_.positions;
    T* to = tile + row * kPitch<T> + k;
#pragma unroll 4
    for (int i = 0; i < Tile::kM; i += kRowsAtOnce, from += step) {
      if (Tile::kM % kRowsAtOnce != 0 && row >= Tile::kM) break;  // more threads than copies
      copy_async<kBytes>(to + i * kPitch<T>, from, inside & (row + i < rows_));
    }
  }

  // A thread keeps its position and walks the columns; a row's threads are neighbours.
  __device__ void gather(int first, T* tile) {
    const int k = threadIdx.x % kK;
    const int position = first + k < end_ ? first + k : end_ - 1;
    const int z = task_.by_plane.divide(position);
    const int in_plane = position - z * static_cast<int>(task_.by_plane.divisor);
    const int y = task_.by_row.divide(in_plane);
    const int x = in_plane - y * static_cast<int>(task_.by_row.divisor);
    const int height = y * task_.stride[1] - task_.padding[1];
    const int width = x * task_.stride[2] - task_.padding[2];
    int depth = z * task_.stride[0] - task_.padding[0];
    const int* size = task_.moving_size;
    const char* base = reinterpret_cast<const char*>(
        moving_ + ((static_cast<std::int64_t>(depth) * size[1] + height) * size[2] + width));
    if (first + k >= end_) depth = kOutside;
    T* mine = tile + threadIdx.x / kK * kPitch<T> + k;
    const ConvColumn* columns = columns_ + threadIdx.x / kK;
    // Columns are read four at a time: an asynchronous copy is a barrier to the compiler.
    constexpr int kAtOnce = 4;
    static_assert(kGathers % kAtOnce == 0, "whole groups of columns");
#pragma unroll
    for (int i = 0; i < kGathers; i += kAtOnce) {
      ConvColumn column[kAtOnce];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) column[c] = columns[(i + c) * kColumnsAtOnce];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const bool inside = is_below(depth + column[c].depth, size[0]) &
                            is_below(height + column[c].height, size[1]) &
                            is_below(width + column[c].width, size[2]);
        const T* from = reinterpret_cast<const T*>(base + column[c].offset);
        if constexpr (kAsync) {
          copy_async<4>(mine + (i + c) * kColumnsAtOnce * kPitch<T>, from, inside);
        } else {
          values_[i + c] = T(0.0f);
          if (inside) values_[i + c] = *from;
        }
      }
    }
  }

  __device__ static bool is_below(int value, int size) {
    return static_cast<unsigned>(value) < static_cast<unsigned>(size);
  }

  const ConvTask& task_;
  const T* anchor_;  // [rows, positions]
  const T* moving_;  // [n, moving_size...]
  int rows_, end_;
  const ConvColumn* columns_;  // [kN] in shared memory
  T values_[kAsync ? 1 : kGathers];
};

// Full float32: a thread owns kThreadM x kThreadN sums, rows and columns apart by the number of
// threads along them, so that neighbours read neighbouring rows of the tile.
template <class Tile_, int kThreadM, int kThreadN>
class FloatForm {
  static constexpr int kThreadColumns = Tile_::kN / kThreadN;
  static constexpr int kThreadRows = Tile_::kM / kThreadM;
  static_assert(kThreadRows * kThreadColumns == Tile_::kThreads, "every thread has sums");

 public:
  using Tile = Tile_;

  __device__ void multiply(const float* tile) {
    const float* rows = tile + threadIdx.x / kThreadColumns * kPitch<float>;
    const float* columns = tile + (Tile::kM + threadIdx.x % kThreadColumns) * kPitch<float>;
#pragma unroll 1  // unrolled, it takes up to 244 registers
    for (int k = 0; k < kPositions<float>; k += 4) {
      float4 a[kThreadM];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
        a[i] = *reinterpret_cast<const float4*>(rows + i * kThreadRows * kPitch<float> + k);
      }
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) {
        const float4 b =
            *reinterpret_cast<const float4*>(columns + j * kThreadColumns * kPitch<float> + k);
#pragma unroll
        for (int i = 0; i < kThreadM; ++i) {
          sums_[i][j] += a[i].x * b.x;
          sums_[i][j] += a[i].y * b.y;
          sums_[i][j] += a[i].z * b.z;
          sums_[i][j] += a[i].w * b.w;
        }
      }
    }
  }

  // visit(row, column, sum)
  template <class Visit>
  __device__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) {
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
        visit(static_cast<int>(threadIdx.x) / kThreadColumns + i * kThreadRows,
              static_cast<int>(threadIdx.x) % kThreadColumns + j * kThreadColumns, sums_[i][j]);
      }
    }
  }

 private:
  float sums_[kThreadM][kThreadN] = {};
};

// Tensor cores: a warp owns (kM / kWarpsM) x (kN / kWarpsN) sums, in fragments of 16 x 8.
template <class Tile_, int kWarpsM, int kWarpsN>
class TensorForm {
  using T = typename Tile_::Value;
  static constexpr int kRows = Tile_::kM / kWarpsM / kMmaRows;
  static constexpr int kColumns = Tile_::kN / kWarpsN / kMmaColumns;
  static constexpr int kWords = kRowBytes / 4;
  static constexpr int kPitchWords = kPitchBytes / 4;
  static_assert(kWarpsM * kWarpsN * 32 == Tile_::kThreads, "every warp has sums");

 public:
  using Tile = Tile_;

  __device__ void multiply(const T* tile) {
    const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(tile) + member();
    const std::uint32_t* rows = words + (first_row() + group()) * kPitchWords;
    const std::uint32_t* columns = words + (Tile::kM + first_column() + group()) * kPitchWords;
#pragma unroll
    for (int k = 0; k < kWords; k += kMmaWords) {
      std::uint32_t a[kRows][4], b[kColumns][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[i][r] =
              fragment_word<T>(rows[(i * kMmaRows + r % 2 * 8) * kPitchWords + k + r / 2 * 4]);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          b[j][r] = fragment_word<T>(columns[j * kMmaColumns * kPitchWords + k + r * 4]);
        }
      }
      multiply_fragments<T>(sums_, a, b);
    }
  }

  template <class Visit>
  __device__ void for_each(const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          visit(first_row() + i * kMmaRows + group() + r / 2 * 8,
                first_column() + j * kMmaColumns + 2 * member() + r % 2, sums_[i][j][r]);
        }
      }
    }
  }

 private:
  __device__ static int group() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  __device__ static int member() { return static_cast<int>(threadIdx.x) % 4; }
  __device__ static int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsN * kRows * kMmaRows;
  }
  __device__ static int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsN * kColumns * kMmaColumns;
  }

  float sums_[kRows][kColumns][4] = {};
};

}  // namespace dpfast::cuda
