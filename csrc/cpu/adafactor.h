// Adafactor. Shazeer & Stern 2018, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, Alg. 4 and 5
// (arXiv:1804.04235), in the form of torch.optim.Adafactor: means instead of sums, lr as the largest relative step, and
// eps1 as a floor of what is divided by.
//   a = t^beta2_decay                               rho = min(lr, 1/sqrt(t))       alpha = rho max(eps2, rms(p))
//   r <- (1-a) r + a mean_columns(g^2)              c <- (1-a) c + a mean_rows(g^2)      for a matrix
//   u = g / max(sqrt(r c / max(mean(r), eps1)), eps1)
//   v <- (1-a) v + a g^2        u = g / max(sqrt(v), eps1)                         for a vector
//   p <- (1 - lr wd) p - alpha u / max(1, rms(u)/d)
//
// No rule of one element: a step is a sequence of five phases over one tensor, each a number of items that threads may
// share in any way. An item writes what no other item of its phase touches; sums are taken in double, within an item
// in the lanes of core::sum, and over the items in their order. So the result is the same for any number of threads and
// any instruction set.
//
// Memory is passed over as often as the formula's dependences demand: rms(u) needs all of c, which needs all of g, and
// p needs rms(u). So there are three passes over a large matrix: g and p (for its rms) are read; g is read; g and p are
// read and p is written. There are two over a matrix that fits into an item, and over a vector: the first and the last;
// those over a vector also read v twice and write it once.
#pragma once

#include "cpu/adafactor_loops.h"

namespace pytrain::PT_ISA::cpu {

// One tensor: `batch` contiguous row-major matrices of rows x cols, or (matrix = false) a vector of cols elements.
// Of the states, row_var has batch * rows elements and col_var batch * cols; a vector has its variance in col_var.
template <class T>
struct AdafactorTensor {
  T* p;
  const T* g;
  T* row_var;
  T* col_var;
  int64_t batch, rows, cols;
  bool matrix;
  T grad_coef;  // what g is multiplied by: 1 / loss scale, negative to maximize
};

// std::min and std::max could be linked from another instruction set's copy.
PT_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PT_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How a tensor is cut into items; by its shape alone.
struct AdafactorCut {
  static constexpr int64_t block = 32768;  // elements of an item, about: fp32 p and g of it fit into half an L2
  static constexpr int64_t most = 64;      // items of one matrix, each of which has sums of all its columns
  static constexpr int64_t tile = 512;     // elements of a piece in L1, and columns of an item of `columns`

  int64_t batch, rows, cols;
  bool matrix, whole;  // whole: items of whole matrices
  int64_t span;        // of a vector elements, of a small matrix matrices, of a large one rows in an item
  int64_t per_matrix;  // items of one matrix, if large
  int64_t items;

  AdafactorCut(int64_t batch, int64_t rows, int64_t cols, bool matrix)
      : batch(batch), rows(rows), cols(cols), matrix(matrix), whole(matrix && rows * cols <= block), per_matrix(1) {
    if (!matrix) {
      span = block;
      items = (cols + block - 1) / block;
    } else if (whole) {
      span = larger(1, block / larger(1, rows * cols));
      items = rows * cols > 0 ? (batch + span - 1) / span : 0;
    } else {
      span = larger((rows + most - 1) / most, (block + cols - 1) / cols);
      per_matrix = (rows + span - 1) / span;
      items = batch * per_matrix;
    }
  }

  bool large() const { return matrix && !whole; }
  int64_t tiles() const { return (cols + tile - 1) / tile; }
  // The workspace: doubles for sums, and elements of T for the factors. It need not be cleared.
  int64_t doubles() const { return 1 + 3 * items + (large() ? items * cols : 0); }
  int64_t factors() const { return matrix ? batch * (rows + cols) : 0; }
};

// One step of one tensor: for each phase from the first to the last, run every item once, then wait for all of them.
template <class T>
class AdafactorStep {
 public:
  enum Phase : int { measure, columns, clip, settle, apply };
  static constexpr int phases = 5;

  AdafactorStep(const Adafactor& rule, const AdafactorTensor<T>& tensor, double* doubles, T* factors)
      : rule_(rule),
        x_(tensor),
        cut_(tensor.batch, tensor.rows, tensor.cols, tensor.matrix),
        step_size_(doubles),
        p_squares_(doubles + 1),
        u_squares_(p_squares_ + cut_.items),
        row_sums_(u_squares_ + cut_.items),
        col_sums_(row_sums_ + cut_.items),
        row_factors_(factors),
        col_factors_(factors + tensor.batch * tensor.rows) {}

  int64_t items(int phase) const {
    if (phase == measure || phase == apply) return cut_.items;
    if (phase == settle) return cut_.items > 0;
    if (!cut_.large()) return 0;
    return phase == clip ? cut_.items : cut_.batch * cut_.tiles();
  }

  // What an item of a phase costs, about, in elements that are read.
  int64_t cost(int phase) const {
    if (phase == settle) return 1;
    if (phase == columns) return smaller(tile, x_.cols) * cut_.per_matrix;
    return cut_.span * (!x_.matrix ? 1 : cut_.whole ? x_.rows * x_.cols : x_.cols);
  }

  void run(int phase, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (phase == measure) {
        x_.matrix ? cut_.whole ? measure_matrices(i) : measure_rows(i) : measure_vector(i);
      } else if (phase == columns) {
        add_columns(i / cut_.tiles(), i % cut_.tiles());
      } else if (phase == clip) {
        clip_rows(i);
      } else if (phase == settle) {
        const double numel = double(x_.batch) * double(x_.matrix ? x_.rows : 1) * double(x_.cols);
        *step_size_ = rule_.step_size(core::sum(p_squares_, cut_.items), core::sum(u_squares_, cut_.items), numel);
      } else if (x_.matrix) {
        apply_rows(i);
      } else {
        apply_vector(i);
      }
    }
  }

 private:
  struct Range {
    int64_t first, last;
  };
  // Rows of an item, counted through the whole batch; of a vector, elements.
  Range range(int64_t item) const {
    if (!x_.matrix || cut_.whole) {
      const int64_t unit = x_.matrix ? x_.rows : 1, all = x_.matrix ? x_.batch : x_.cols;
      return {item * cut_.span * unit, smaller(all, (item + 1) * cut_.span) * unit};
    }
    const int64_t first = item / cut_.per_matrix * x_.rows, row = item % cut_.per_matrix * cut_.span;
    return {first + row, first + smaller(x_.rows, row + cut_.span)};
  }

  static constexpr int64_t tile = AdafactorCut::tile;

  // ---- sums of a row; the rows of a convolution's matrices are too short for tiles ---------------------------------

  static constexpr int64_t few = 8;

  static double squares(const T* x, int64_t n) {
    T terms[tile];
    double total = 0.0;
    for (int64_t done = 0; done < n; done += tile) {
      const int64_t m = smaller(tile, n - done);
      square(x + done, terms, m);
      total += core::sum(terms, m);
    }
    return total;
  }

  T largest() const { return T(1.0 / rule_.eps1); }

  double scaled_squares(const T* g) const {
    T terms[tile];
    double total = 0.0;
    if (x_.cols <= few) {
      for (int64_t j = 0; j < x_.cols; ++j) total += (g[j] * x_.grad_coef) * (g[j] * x_.grad_coef);
      return total;
    }
    for (int64_t done = 0; done < x_.cols; done += tile) {
      const int64_t m = smaller(tile, x_.cols - done);
      scaled_square(g + done, x_.grad_coef, terms, m);
      total += core::sum(terms, m);
    }
    return total;
  }

  // The same, and each square goes into the sum of its column too.
  double both_squares(const T* g, double* sums, bool first) const {
    T terms[tile];
    double total = 0.0;
    for (int64_t done = 0; done < x_.cols; done += tile) {
      const int64_t m = smaller(tile, x_.cols - done);
      scaled_square(g + done, x_.grad_coef, terms, m);
      if (first) {
        put_columns(terms, sums + done, m);
      } else {
        add_to_columns(terms, sums + done, m);
      }
      total += core::sum(terms, m);
    }
    return total;
  }

  void column_means(int64_t matrix, int64_t column, int64_t n) const {
    double sums[tile];
    for (int64_t j = 0; j < n; ++j) sums[j] = 0.0;
    for (int64_t row = matrix * x_.rows; row < (matrix + 1) * x_.rows; ++row) {
      const T* const g = x_.g + row * x_.cols + column;
      for (int64_t j = 0; j < n; ++j) sums[j] += (g[j] * x_.grad_coef) * (g[j] * x_.grad_coef);
    }
    T* const means = col_factors_ + matrix * x_.cols + column;
    for (int64_t j = 0; j < n; ++j) means[j] = T(sums[j] / double(x_.rows));
  }

  double row_sum(int64_t row) const {
    if (x_.rows > few) return core::sum(x_.row_var + row, x_.rows);
    double total = 0.0;
    for (int64_t i = 0; i < x_.rows; ++i) total += x_.row_var[row + i];
    return total;
  }

  // Of u.
  double row_squares(int64_t row, int64_t matrix) const {
    const T* const g = x_.g + row * x_.cols;
    const T* const col = col_factors_ + matrix * x_.cols;
    T terms[tile];
    double total = 0.0;
    if (x_.cols <= few) {
      for (int64_t j = 0; j < x_.cols; ++j) {
        const T u = Adafactor::factored(g[j] * x_.grad_coef, row_factors_[row], col[j], largest());
        total += u * u;
      }
      return total;
    }
    for (int64_t done = 0; done < x_.cols; done += tile) {
      const int64_t m = smaller(tile, x_.cols - done);
      factored_squares(g + done, x_.grad_coef, row_factors_[row], col + done, largest(), terms, m);
      total += core::sum(terms, m);
    }
    return total;
  }

  // ---- the phases -------------------------------------------------------------------------------------------------

  // The averages of n rows (from `row`) or columns (from `column`), whose new means stand where their factors will.
  void average_rows(int64_t row, int64_t n) const {
    average(x_.row_var + row, row_factors_ + row, T(rule_.weight), n);
  }
  void average_columns(int64_t column, int64_t n) const {
    average(x_.col_var + column, col_factors_ + column, T(rule_.weight), n);
    inverse_roots(x_.col_var + column, 1.0, col_factors_ + column, n);
  }
  void factor_rows(int64_t row, int64_t n, double mean) const {
    inverse_roots(x_.row_var + row, rule_.row_divisor(T(mean)), row_factors_ + row, n);
  }

  void measure_vector(int64_t item) const {
    const Range r = range(item);
    T terms[tile];
    double p_squares = 0.0, u_squares = 0.0;
    for (int64_t at = r.first; at < r.last; at += tile) {
      const int64_t m = smaller(tile, r.last - at);
      unfactored_squares(x_.g + at, x_.grad_coef, x_.col_var + at, T(rule_.weight), T(rule_.eps1), terms, m);
      u_squares += core::sum(terms, m);
      p_squares += squares(x_.p + at, m);
    }
    p_squares_[item] = p_squares;
    u_squares_[item] = u_squares;
  }

  // A large matrix: its row averages are done here, its columns are left as sums.
  void measure_rows(int64_t item) const {
    const Range r = range(item);
    double p_squares = 0.0;
    for (int64_t row = r.first; row < r.last; ++row) {
      const T* const g = x_.g + row * x_.cols;
      row_factors_[row] = T(both_squares(g, col_sums_ + item * x_.cols, row == r.first) / double(x_.cols));
      p_squares += squares(x_.p + row * x_.cols, x_.cols);
    }
    average_rows(r.first, r.last - r.first);
    p_squares_[item] = p_squares;
    row_sums_[item] = core::sum(x_.row_var + r.first, r.last - r.first);
  }

  void add_columns(int64_t matrix, int64_t number) const {
    const int64_t first = number * tile, m = smaller(tile, x_.cols - first), at = matrix * x_.cols + first;
    const double* const sums = col_sums_ + matrix * cut_.per_matrix * x_.cols + first;
    double totals[tile] = {};
    for (int64_t k = 0; k < cut_.per_matrix; ++k) {
      for (int64_t j = 0; j < m; ++j) totals[j] += sums[k * x_.cols + j];
    }
    for (int64_t j = 0; j < m; ++j) col_factors_[at + j] = T(totals[j] / double(x_.rows));
    average_columns(at, m);
  }

  void clip_rows(int64_t item) const {
    const Range r = range(item);
    const int64_t matrix = item / cut_.per_matrix;
    const double* const sums = row_sums_ + matrix * cut_.per_matrix;
    factor_rows(r.first, r.last - r.first, core::sum(sums, cut_.per_matrix) / double(x_.rows));
    double u_squares = 0.0;
    for (int64_t row = r.first; row < r.last; ++row) u_squares += row_squares(row, matrix);
    u_squares_[item] = u_squares;
  }

  // Small matrices: all that stands between two reads of g happens while it is in the cache.
  void measure_matrices(int64_t item) const {
    const Range r = range(item);
    const int64_t first = r.first / x_.rows, last = r.last / x_.rows;
    for (int64_t matrix = first; matrix < last; ++matrix) {
      const int64_t row = matrix * x_.rows;
      for (int64_t i = 0; i < x_.rows; ++i) {
        row_factors_[row + i] = T(scaled_squares(x_.g + (row + i) * x_.cols) / double(x_.cols));
      }
      for (int64_t done = 0; done < x_.cols; done += tile) column_means(matrix, done, smaller(tile, x_.cols - done));
    }
    average_rows(r.first, r.last - r.first);
    average_columns(first * x_.cols, (last - first) * x_.cols);
    double u_squares = 0.0;
    for (int64_t matrix = first; matrix < last; ++matrix) {
      const int64_t row = matrix * x_.rows;
      factor_rows(row, x_.rows, row_sum(row) / double(x_.rows));
      for (int64_t i = 0; i < x_.rows; ++i) u_squares += row_squares(row + i, matrix);
    }
    u_squares_[item] = u_squares;
    p_squares_[item] = squares(x_.p + r.first * x_.cols, (r.last - r.first) * x_.cols);
  }

  void apply_rows(int64_t item) const {
    const Range r = range(item);
    const T keep = T(rule_.keep), size = T(*step_size_), most = largest();
    for (int64_t row = r.first; row < r.last;) {
      const int64_t matrix = row / x_.rows;
      const T* const col = col_factors_ + matrix * x_.cols;
      for (const int64_t end = smaller(r.last, (matrix + 1) * x_.rows); row < end; ++row) {
        T* const p = x_.p + row * x_.cols;
        const T* const g = x_.g + row * x_.cols;
        if (x_.cols > few) {
          factored_update(p, g, x_.grad_coef, row_factors_[row], col, most, keep, size, x_.cols);
        } else {
          for (int64_t j = 0; j < x_.cols; ++j) {
            p[j] = p[j] * keep - size * Adafactor::factored(g[j] * x_.grad_coef, row_factors_[row], col[j], most);
          }
        }
      }
    }
  }

  void apply_vector(int64_t item) const {
    const Range r = range(item);
    unfactored_update(x_.p + r.first, x_.g + r.first, x_.grad_coef, x_.col_var + r.first, T(rule_.eps1),
                      T(rule_.keep), T(*step_size_), r.last - r.first);
  }

  Adafactor rule_;
  AdafactorTensor<T> x_;
  AdafactorCut cut_;
  double* step_size_;
  double* p_squares_;
  double* u_squares_;
  double* row_sums_;
  double* col_sums_;
  T* row_factors_;
  T* col_factors_;
};

// ---- for the table of kernels ------------------------------------------------------------------------------------

using pytrain::cpu::AdafactorJob;

template <class T>
int64_t adafactor_workspace(const AdafactorJob& job) {
  const AdafactorCut cut(job.batch, job.rows, job.cols, job.matrix);
  constexpr int64_t per_double = sizeof(double) / sizeof(T);
  return cut.doubles() + (cut.factors() + per_double - 1) / per_double;
}

template <class T>
void adafactor_prepare(const AdafactorJob& job, const pytrain::core::GroupRow& row, double inv_scale, double* workspace,
                       void* memory) {
  using Step = AdafactorStep<T>;
  static_assert(sizeof(Step) <= pytrain::cpu::max_adafactor_bytes && std::is_trivially_copyable_v<Step>);
  Adafactor::Hyper h;
  static_assert(sizeof h <= sizeof row.hypers);
  __builtin_memcpy(&h, row.hypers, sizeof h);
  const AdafactorTensor<T> tensor{static_cast<T*>(job.param),   static_cast<const T*>(job.grad),
                                  static_cast<T*>(job.row_var), static_cast<T*>(job.col_var),
                                  job.batch,                    job.rows,
                                  job.cols,                     job.matrix,
                                  static_cast<T>(row.grad_sign * inv_scale)};
  const AdafactorCut cut(job.batch, job.rows, job.cols, job.matrix);
  T* const factors = reinterpret_cast<T*>(workspace + cut.doubles());
  new (memory) Step(Adafactor(h, job.step, std::numeric_limits<T>::epsilon()), tensor, workspace, factors);
}

template <class T>
int64_t adafactor_items(const void* memory, int phase) {
  return static_cast<const AdafactorStep<T>*>(memory)->items(phase);
}

template <class T>
int64_t adafactor_cost(const void* memory, int phase) {
  return static_cast<const AdafactorStep<T>*>(memory)->cost(phase);
}

template <class T>
void adafactor_run(const void* memory, int phase, int64_t begin, int64_t end) {
  static_cast<const AdafactorStep<T>*>(memory)->run(phase, begin, end);
}

template <class T>
constexpr pytrain::cpu::AdafactorFunctions adafactor_functions() {
  static_assert(AdafactorStep<T>::phases == pytrain::cpu::adafactor_phases);
  return {&adafactor_workspace<T>, &adafactor_prepare<T>, &adafactor_items<T>, &adafactor_cost<T>, &adafactor_run<T>};
}

}  // namespace pytrain::PT_ISA::cpu
