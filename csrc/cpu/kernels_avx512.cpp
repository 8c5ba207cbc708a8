// The kernels for AVX-512 (F, BW, DQ, VL). Standard headers come first: they must not be compiled for it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "core/prefetch.h"
#include "cpu/table.h"

#define PT_ISA avx512
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
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
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
