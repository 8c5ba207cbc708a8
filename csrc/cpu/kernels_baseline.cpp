// The kernels for what every machine of its kind has (SSE2 on x86-64). Standard headers come first, as in its siblings.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/table.h"

#define PT_ISA baseline
#include "core/half.h"
#include "rules/all.h"

#include "cpu/kernels.h"
