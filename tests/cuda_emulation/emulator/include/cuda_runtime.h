#pragma once
#include_next <cuda_runtime.h>

#include "../device.h"
#include "../graphs.h"
