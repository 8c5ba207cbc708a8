// Which instruction sets there are, which this machine has, and which one is in use.
#pragma once

#include <string>

namespace pytrain::cpu {

enum class Isa : int { baseline, avx2, avx512 };
constexpr int isa_count = 3;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The best supported level, or the one that `wanted` names ("" for the best).
// Throws std::runtime_error for a name that is unknown or a level that this machine does not have.
Isa choose_isa(const std::string& wanted);

}  // namespace pytrain::cpu
