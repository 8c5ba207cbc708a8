// Every rule where parameter and states are all fp32.
#include "cuda/backend.h"
#include "cuda/direct.h"
#include "cuda/step.h"

namespace pytrain::cuda {

const char* launch_fp32(int rule, bool measure, const Job& job, int64_t multiprocessors, void* stream) {
  return launch_rule<Direct<float>>(rules::All{}, rule, measure, job, multiprocessors, stream);
}

}  // namespace pytrain::cuda
