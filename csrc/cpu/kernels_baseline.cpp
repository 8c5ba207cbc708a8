// The kernels for what every machine of its kind has (SSE2 on x86-64). Standard headers come first, as in its siblings.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "core/prefetch.h"
#include "cpu/table.h"

#define PT_ISA baseline
#include "core/codec.h"
#include "core/half.h"
#include "core/random.h"
#include "core/sum.h"
#include "rules/all.h"

#include "cpu/adafactor.h"
#include "cpu/tiles.h"

#include "cpu/ahead.h"

#include "cpu/storage.h"

#include "cpu/stats.h"

#include "cpu/copy.h"

#include "cpu/kernels.h"
