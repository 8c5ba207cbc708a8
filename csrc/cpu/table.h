// What every instruction set offers: the loops over segments, and for each rule the functions that they call.
#pragma once

#include <cstdint>

#include "core/control.h"
#include "core/segment.h"

namespace pytrain::cpu {

// One rule's functions over n elements. `rule` is the memory of a prepared rule; sums are of doubles.
struct RuleFunctions {
  void (*prepare)(const core::GroupRow& row, double step, const double* scalars, void* rule);
  void (*update32)(const void* rule, float coef, float* p, const float* g, float* const* states, int64_t n);
  void (*update64)(const void* rule, double coef, double* p, const double* g, double* const* states, int64_t n);
  // Of rules with sums, else null: the terms of each element, and the coefficients once they are summed.
  void (*measure32)(const void* rule, float coef, float* p, const float* g, float* const* states, float* const* terms,
                    int64_t n);
  void (*measure64)(const void* rule, double coef, double* p, const double* g, double* const* states,
                    double* const* terms, int64_t n);
  void (*settle)(void* rule, const double* sums, double numel);
  // Of rules with scalars, else null: their values after the step.
  void (*advance)(const core::GroupRow& row, double step, double* scalars, const double* sums);
  int states, sums;
  bool measure_writes;
};

// The segments laid end to end; segment i starts at element offsets[i] and has its partial sums from partials[i] on.
struct Job {
  const RuleFunctions* rule;
  core::Storage storage;
  const core::Segment* segments;
  const core::Extra* extras;  // may be null where the storage is direct and the rule has neither sums nor scalars
  const int64_t* offsets;
  int64_t n_segments;
  const core::Control* control;
  const int64_t* partial_offsets;
  double* partials;  // one a block of a segment and sum
};

// Averages beside parameters, laid end to end as in a Job; fp32, or fp64 beside an fp64 parameter.
struct AverageJob {
  struct Segment {
    void* average;
    const void* param;
    int64_t numel;
    core::Format format;  // of the parameter
  };
  const Segment* segments;
  const int64_t* offsets;
  int64_t n_segments;
  double weight;
};

// Copies, laid end to end as in a Job. Formats are fp32, bf16 and fp16 in any pair, or fp64 on both sides.
struct CopyJob {
  struct Segment {
    void* to;
    const void* from;
    int64_t numel;
    core::Format to_format, from_format;
  };
  const Segment* segments;
  const int64_t* offsets;
  int64_t n_segments;
  double scale;
  bool accumulate;  // add to what stands there
};

// Work is handed out in blocks of a segment, so that partial sums and 8-bit blocks have one owner.
constexpr int64_t block = 4096;
static_assert(block % core::code_block == 0);
inline int64_t blocks_of(int64_t numel) { return (numel + block - 1) / block; }

// Partial sums, added in their order.
inline double total(const double* partials, int64_t n) {
  double sum = 0.0;
  for (int64_t b = 0; b < n; ++b) sum += partials[b];
  return sum;
}

// One tensor under Adafactor: `batch` row-major matrices of rows x cols, or a vector of cols elements, contiguous.
struct AdafactorJob {
  void* param;
  const void* grad;
  void* row_var;  // one a row of each matrix; nothing of a vector
  void* col_var;  // one a column of each matrix; one an element of a vector
  int64_t batch, rows, cols;
  bool matrix;
  double step;  // 1 on the first
};

constexpr int max_adafactor_bytes = 320;

// Adafactor's step of one tensor: phases, each of items that threads may share at will; a phase begins when all items
// of the one before are done. `memory` holds a prepared step.
struct AdafactorFunctions {
  int64_t (*workspace)(const AdafactorJob& job);  // in doubles; it need not be cleared
  void (*prepare)(const AdafactorJob& job, const core::GroupRow& row, double inv_scale, double* workspace,
                  void* memory);
  int64_t (*items)(const void* memory, int phase);
  int64_t (*cost)(const void* memory, int phase);  // of one item, in elements
  void (*run)(const void* memory, int phase, int64_t begin, int64_t end);
};
constexpr int adafactor_phases = 5;

constexpr int max_rules = 64;

// The ranges are of flattened elements; a block belongs to the range that it begins in.
struct Kernels {
  RuleFunctions rules[max_rules];
  void (*step)(const Job& job, int64_t begin, int64_t end);
  void (*measure)(const Job& job, int64_t begin, int64_t end);
  // The sum of the squares of each block's gradients, one partial a block; nan where one of them is inf or nan.
  void (*stats)(const Job& job, int64_t begin, int64_t end);
  void (*average)(const AverageJob& job, int64_t begin, int64_t end);
  void (*copy)(const CopyJob& job, int64_t begin, int64_t end);
  AdafactorFunctions adafactor32, adafactor64;
};

}  // namespace pytrain::cpu
