// s = residual + gain * dropout(x + bias), and LN(s): what lies between two linear layers of a residual stream, in one
// pass each way.
//
// Traffic, in elements: forward reads x and residual and writes s and LN(s), 4; backward reads the gradients of both, s,
// and x if there is a gain, and writes dx and d_residual, 6. A row of the sum stays in the level-1 cache between what
// makes it, its moments and its normalised form; so do the rows of backward, which are read twice. Gradients of the four
// vectors are sums over rows, taken on the way (rows.h). No mask is stored (philox.h).
#include "dropout_add_norm.h"

#include "blocks.h"
#include "parallel.h"
#include "philox.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

// x as storage type T holds it.
template <class T>
UMDA_INLINE Vec rounded(Vec x, const T*) {
  T lanes[kWidth];
  store(lanes, x);
  return load(lanes);
}
UMDA_INLINE Vec rounded(Vec x, const float*) { return x; }

// The vectors in float32, ones where there is no gain.
struct Vectors {
  explicit Vectors(const DropoutAddNormInput& in)
      : width(in.width), all(3 * in.width), bias(all.data()), gain(bias + width), norm_weight(gain + width) {
    widen_row(in.bias.data, in.bias.type, width, bias);
    widen_row(in.gain.data, in.gain.type, width, gain);
    widen_row(in.norm_weight.data, in.norm_weight.type, width, norm_weight);
    const float kept = dropout_scale(in.seed != nullptr, in.threshold);
    for (int64_t d = 0; d < width; ++d) {
      gain[d] = in.gain.data == nullptr ? kept : gain[d] * kept;
    }
    scale = kept;
  }

  const int64_t width;
  const Scratch<float> all;
  float *const bias, *const gain, *const norm_weight;  // the gain with the scale of what is kept
  float scale;
};

template <class T, class S>
void forward(const DropoutAddNormForward& a) {
  const DropoutAddNormInput& in = a.in;
  const int64_t width = in.width;
  const RowShape shape(in.rows, width);
  const Vectors vectors(in);
  const Scratch<float> shift(width);
  widen_row(a.norm_bias.data, a.norm_bias.type, width, shift.data());
  const float share = 1.0f / static_cast<float>(width);
  parallel_items(shape.partitions, [&](int64_t p) {
    const Scratch<uint16_t> drawn(in.seed == nullptr ? 0 : shape.numbers_per_tile() + kWidth);
    const Scratch<float> line(width);
    float* const row = line.data();
    in_tiles(shape, p, in.seed, drawn.data(), [&](int64_t first, int64_t count, const uint16_t* drawn_here) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * width;
        const T* const x = static_cast<const T*>(in.x) + at;
        const S* const residual = static_cast<const S*>(a.residual) + at;
        S* const sum_of = static_cast<S*>(a.sum) + at;
        const uint16_t* const numbers = drawn_here == nullptr ? nullptr : drawn_here + i * shape.numbers_per_row();
        Vec total = zero();
        in_blocks<1>(width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
          const Vec own = (read(x + d) + read(vectors.bias + d)) * read(vectors.gain + d);
          const Vec added = numbers == nullptr ? own : keep(own, numbers + d, in.threshold);
          const Vec s = rounded(read(residual + d) + added, sum_of);
          write(sum_of + d, s);
          write(row + d, s);
          total = total + s;  // lanes beyond the row are 0
        });
        if (a.normed == nullptr) {
          continue;
        }
        const float mean = sum(total) * share;
        const Vec centre = splat(mean);
        Vec square = zero();
        in_blocks<1>(width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
          write(row + d, read(row + d) - centre);
          const Vec off = read(row + d);
          square = fma(off, off, square);
        });
        const float rstd = 1.0f / __builtin_sqrtf(sum(square) * share + a.eps);
        const Vec inverse = splat(rstd);
        T* const normed = static_cast<T*>(a.normed) + at;
        in_blocks<1>(width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
          write(normed + d, fma(read(row + d) * inverse, read(vectors.norm_weight + d), read(shift.data() + d)));
        });
        a.mean[first + i] = mean;
        a.rstd[first + i] = rstd;
      }
    });
  });
}

// Sums over rows of a tile and of a partition, of four vectors one behind the other.
struct Sums {
  explicit Sums(int64_t width) : all(8 * width), of_tile(all.data()), of_all(of_tile + 4 * width) {
    __builtin_memset(of_tile, 0, static_cast<size_t>(8 * width) * sizeof(float));
  }

  const Scratch<float> all;
  float *const of_tile, *const of_all;
};

template <class T, class S>
void backward(const DropoutAddNormBackward& a) {
  const DropoutAddNormInput& in = a.in;
  const int64_t width = in.width;
  const RowShape shape(in.rows, width);
  const Vectors vectors(in);
  const Scratch<float> parts(shape.partitions * 4 * width);
  const float share = 1.0f / static_cast<float>(width);
  parallel_items(shape.partitions, [&](int64_t p) {
    const Scratch<uint16_t> drawn(in.seed == nullptr ? 0 : shape.numbers_per_tile() + kWidth);
    const Sums sums(width);
    float *const to_bias = sums.of_tile, *const to_gain = to_bias + width;
    float *const to_weight = to_gain + width, *const to_shift = to_weight + width;
    in_tiles(shape, p, in.seed, drawn.data(), [&](int64_t first, int64_t count, const uint16_t* drawn_here) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * width;
        const uint16_t* const numbers = drawn_here == nullptr ? nullptr : drawn_here + i * shape.numbers_per_row();
        const T* const d_normed = a.d_normed == nullptr ? nullptr : static_cast<const T*>(a.d_normed) + at;
        const S* const d_sum = a.d_sum == nullptr ? nullptr : static_cast<const S*>(a.d_sum) + at;
        const S* const total = static_cast<const S*>(a.sum) + at;
        const Vec centre = splat(d_normed == nullptr ? 0.0f : a.mean[first + i]);
        const Vec inverse = splat(d_normed == nullptr ? 0.0f : a.rstd[first + i]);
        Vec straight = zero(), along = zero();
        if (d_normed != nullptr) {
          Vec first_sum = zero(), second_sum = zero();
          in_blocks<1>(width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
            const Vec normal = (read(total + d) - centre) * inverse;
            const Vec slope = read(d_normed + d);
            write(to_shift + d, read(to_shift + d) + slope);
            write(to_weight + d, fma(slope, normal, read(to_weight + d)));
            const Vec scaled = slope * read(vectors.norm_weight + d);  // 0 in lanes beyond the row
            first_sum = first_sum + scaled;
            second_sum = fma(scaled, normal, second_sum);
          });
          straight = splat(sum(first_sum) * share);
          along = splat(sum(second_sum) * share);
        }
        T* const dx = static_cast<T*>(a.dx) + at;
        S* const d_residual = static_cast<S*>(a.d_residual) + at;
        const T* const x = static_cast<const T*>(in.x) + at;
        const Vec scale = splat(vectors.scale);
        in_blocks<1>(width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
          Vec all = d_sum == nullptr ? zero() : read(d_sum + d);
          if (d_normed != nullptr) {
            const Vec normal = (read(total + d) - centre) * inverse;
            const Vec scaled = read(d_normed + d) * read(vectors.norm_weight + d);
            all = fma(scaled - straight - normal * along, inverse, all);
          }
          write(d_residual + d, all);
          const Vec kept = numbers == nullptr ? all : keep(all, numbers + d, in.threshold);
          const Vec own = kept * read(vectors.gain + d);
          write(dx + d, own);
          write(to_bias + d, read(to_bias + d) + own);
          if (a.d_gain != nullptr) {
            const Vec what = (read(x + d) + read(vectors.bias + d)) * scale;
            // What was dropped may be anything, infinity too.
            const Vec seen = numbers == nullptr ? what : keep(what, numbers + d, in.threshold);
            write(to_gain + d, fma(kept, seen, read(to_gain + d)));
          }
        });
      }
      in_blocks<1>(4 * width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
        write(sums.of_all + d, read(sums.of_all + d) + read(sums.of_tile + d));
        write(sums.of_tile + d, zero());
      });
    });
    __builtin_memcpy(parts.data() + p * 4 * width, sums.of_all, static_cast<size_t>(4 * width) * sizeof(float));
  });
  const auto reduce = [&](int64_t which, DType type, void* to) {
    if (to != nullptr) {
      UMDA_DISPATCH_DTYPE(type, sum_partitions(parts.data() + which * width, shape.partitions, 4 * width, width,
                                               static_cast<scalar_t*>(to)));
    }
  };
  reduce(0, in.bias.type, a.d_bias);
  reduce(1, in.gain.type, a.d_gain);
  reduce(2, in.norm_weight.type, a.d_norm_weight);
  reduce(3, in.norm_weight.type, a.d_norm_bias);
}

}  // namespace

void dropout_add_norm_forward(const DropoutAddNormForward& a) {
  UMDA_DISPATCH_DTYPE(a.in.type, using row_t = scalar_t;
                      UMDA_DISPATCH_DTYPE(a.in.stream_type, (forward<row_t, scalar_t>(a))));
}

void dropout_add_norm_backward(const DropoutAddNormBackward& a) {
  UMDA_DISPATCH_DTYPE(a.in.type, using row_t = scalar_t;
                      UMDA_DISPATCH_DTYPE(a.in.stream_type, (backward<row_t, scalar_t>(a))));
}

}  // namespace umda::UMDA_ISA
