// Asks the processor (and, through the compiler's builtin, the operating system) which levels may run.
#include "cpu/isa.h"

#include <stdexcept>

namespace pytrain::cpu {

const char* isa_name(Isa isa) {
  static constexpr const char* names[isa_count] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::baseline;
}

Isa choose_isa(const std::string& wanted) {
  std::string supported;
  for (int level = 0; level < isa_count; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (isa_supported(isa)) supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
  }
  for (int level = isa_count - 1; level >= 0; --level) {
    const Isa isa = static_cast<Isa>(level);
    if (wanted == isa_name(isa) && !isa_supported(isa)) {
      throw std::runtime_error("PYTRAIN_ISA: this machine does not have '" + wanted + "'; it has: " + supported);
    }
    if (wanted.empty() ? isa_supported(isa) : wanted == isa_name(isa)) return isa;
  }
  throw std::runtime_error("PYTRAIN_ISA: expected baseline, avx2 or avx512, got '" + wanted + "'; this machine has: " +
                           supported);
}

}  // namespace pytrain::cpu
