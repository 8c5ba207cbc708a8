// From an instruction set to its kernels: chosen once, at the first step.
#pragma once

#include "cpu/isa.h"
#include "cpu/table.h"

namespace pytrain::cpu {

// The level in use: what PYTRAIN_ISA names, else the best that this machine has.
Isa current_isa();
void set_isa(Isa isa);
const Kernels& current_kernels();

}  // namespace pytrain::cpu
