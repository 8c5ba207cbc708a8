// A segment: the memory of one parameter as the loops see it. A list of tensors is many, a flat bucket is one.
#pragma once

#include <cstdint>

namespace pytrain::core {

constexpr int max_states = 4;
constexpr int max_scalars = 2;
constexpr int max_sums = 2;

// How numbers are stored. `s8` and `u8` are 8-bit codes, signed and not, with one fp32 scale a block of `code_block`;
// `i16` is the low half of a master.
enum class Format : int { none = -1, fp32, fp64, bf16, fp16, s8, u8, i16 };
constexpr int64_t code_block = 256;
constexpr int64_t random_tile = 512;  // elements that share a call of the generator of random numbers

constexpr int64_t bytes(Format format) {
  return format == Format::fp64 ? 8 : format == Format::fp32 ? 4 : format == Format::s8 || format == Format::u8 ? 1 : 2;
}

// What is kept beside a bf16 or fp16 parameter: nothing, an fp32 master, the 16 bits of a master that a bf16 parameter
// leaves out, or what the last rounding lost (Kahan).
enum class Keep : int { nothing, master, low_bits, compensation };

// Everything that is the same for all segments of a table.
struct Storage {
  Format param = Format::none;
  Format states[max_states] = {};
  Keep keep = Keep::nothing;
  bool ema = false;
  bool ema_by_count = false;  // an average begins with its parameter's first step, whatever its weight
  bool zero_grad = false;
  bool stochastic = false;
  uint64_t seed = 0;

  // Whether a step needs an Extra a segment, for a rule without scalars and sums.
  bool needs_extras(int n_states) const {
    bool coded = false;
    for (int s = 0; s < n_states; ++s) coded |= states[s] == Format::s8 || states[s] == Format::u8;
    return coded || ema || stochastic || keep != Keep::nothing;
  }
};

struct Segment {
  void* param;
  void* grad;  // written only where the storage says zero_grad
  void* states[max_states];
  int64_t numel;
  int64_t group;   // row of the control block
  double step;     // the step count t of this update: 1 on the first
};

// What only some tables need of a segment; in a list of its own so that the others do not walk over it.
struct Extra {
  void* kept;                    // as Keep says
  void* ema;                     // fp32, or fp64 beside an fp64 parameter
  float* scales[max_states];     // of states in 8-bit codes
  double scalars[max_scalars];   // as they were before this step
  double sums[max_sums];         // over the whole segment, once they are taken
  int64_t index;                 // which parameter this is, or is a part of, to the random numbers
  int64_t begin;                 // the element of that parameter that the segment begins with
  int64_t whole;                 // how many elements it has
};

}  // namespace pytrain::core
