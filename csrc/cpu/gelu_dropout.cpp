// y = dropout(gelu(x + bias)); what lies between two linear layers, in one pass each way.
//
// Traffic: forward reads x and writes y, 2 elements; backward reads x and d_y and writes dx, 3. No mask is stored: it is
// drawn again (philox.h), for a tile of rows at a time, into the level-1 cache. Work: about 35 operations an element for
// GELU and 20 for the random numbers: with 16 lanes about what the memory of one core's share takes anyway.
#include "gelu_dropout.h"

#include "blocks.h"
#include "gelu.h"
#include "parallel.h"
#include "philox.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

template <class T>
void forward(const GeluDropoutForward& a) {
  const GeluDropoutInput& in = a.in;
  const RowShape shape(in.rows, in.width);
  const Scratch<float> bias(in.width);
  widen_row(in.bias, in.bias_type, in.width, bias.data());
  const Vec scale = splat(dropout_scale(in.seed != nullptr, in.threshold));
  const bool past_cache = worth_streaming(static_cast<const T*>(a.y), in.rows, in.width);
  parallel_items(shape.partitions, [&](int64_t p) {
    const Scratch<uint16_t> drawn(in.seed == nullptr ? 0 : shape.numbers_per_tile() + kWidth);
    in_tiles(shape, p, in.seed, drawn.data(), [&](int64_t first, int64_t count, const uint16_t* numbers) {
      for (int64_t i = 0; i < count; ++i) {
        const T* const x = static_cast<const T*>(in.x) + (first + i) * in.width;
        T* const y = static_cast<T*>(a.y) + (first + i) * in.width;
        const uint16_t* const row = numbers == nullptr ? nullptr : numbers + i * shape.numbers_per_row();
        in_blocks<1>(in.width, past_cache, [&](int64_t d, auto, auto&& read, auto&&, auto&& put) UMDA_LAMBDA_INLINE {
          const Vec active = gelu(read(x + d) + read(bias.data() + d));
          put(y + d, row == nullptr ? active : keep(active * scale, row + d, in.threshold));
        });
      }
    });
    stream_fence();
  });
}

template <class T>
void backward(const GeluDropoutBackward& a) {
  const GeluDropoutInput& in = a.in;
  const RowShape shape(in.rows, in.width);
  const Scratch<float> bias(in.width);
  widen_row(in.bias, in.bias_type, in.width, bias.data());
  const Scratch<float> parts(a.d_bias == nullptr ? 0 : shape.partitions * in.width);
  const Vec scale = splat(dropout_scale(in.seed != nullptr, in.threshold));
  const bool past_cache = worth_streaming(static_cast<const T*>(a.dx), in.rows, in.width);
  parallel_items(shape.partitions, [&](int64_t p) {
    const Scratch<uint16_t> drawn(in.seed == nullptr ? 0 : shape.numbers_per_tile() + kWidth);
    const Scratch<float> sums(2 * in.width);
    float *const of_tile = sums.data(), *const of_all = of_tile + in.width;
    __builtin_memset(of_tile, 0, static_cast<size_t>(2 * in.width) * sizeof(float));
    in_tiles(shape, p, in.seed, drawn.data(), [&](int64_t first, int64_t count, const uint16_t* numbers) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * in.width;
        const T* const x = static_cast<const T*>(in.x) + at;
        const T* const d_y = static_cast<const T*>(a.d_y) + at;
        T* const dx = static_cast<T*>(a.dx) + at;
        const uint16_t* const row = numbers == nullptr ? nullptr : numbers + i * shape.numbers_per_row();
        in_blocks<1>(in.width, past_cache, [&](int64_t d, auto, auto&& read, auto&& write, auto&& put) UMDA_LAMBDA_INLINE {
          const Vec slope = gelu_slope(read(x + d) + read(bias.data() + d));
          const Vec all = read(d_y + d) * slope;
          const Vec found = row == nullptr ? all : keep(all * scale, row + d, in.threshold);
          put(dx + d, found);
          write(of_tile + d, read(of_tile + d) + found);
        });
      }
      in_blocks<1>(in.width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
        write(of_all + d, read(of_all + d) + read(of_tile + d));
        write(of_tile + d, zero());
      });
    });
    if (a.d_bias != nullptr) {
      __builtin_memcpy(parts.data() + p * in.width, of_all, static_cast<size_t>(in.width) * sizeof(float));
    }
    stream_fence();
  });
  if (a.d_bias != nullptr) {
    UMDA_DISPATCH_DTYPE(in.bias_type, sum_partitions(parts.data(), shape.partitions, in.width, in.width,
                                                     static_cast<scalar_t*>(a.d_bias)));
  }
}

}  // namespace

void gelu_dropout_forward(const GeluDropoutForward& a) { UMDA_DISPATCH_DTYPE(a.in.type, forward<scalar_t>(a)); }

void gelu_dropout_backward(const GeluDropoutBackward& a) { UMDA_DISPATCH_DTYPE(a.in.type, backward<scalar_t>(a)); }

}  // namespace umda::UMDA_ISA
