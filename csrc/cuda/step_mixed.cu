// Every rule where something is stored in fewer bits.
#include "cuda/backend.h"
#include "cuda/mixed.h"
#include "cuda/step.h"

namespace pytrain::cuda {

const char* launch_mixed(int rule, bool measure, const Job& job, int64_t multiprocessors, void* stream) {
  return launch_rule<Mixed>(rules::All{}, rule, measure, job, multiprocessors, stream);
}

}  // namespace pytrain::cuda
