// What the launches move between the parameters' memory and the threads, for the budgets in budgets.json.
#pragma once

#include "simt/steps.h"

inline int print_traffic() { return 0; }
