// The two products made from one packed copy.
#pragma once
#include "kts/kernel.h"
#include "kts/pack.h"
#include "kts/tables.h"

namespace kts {

// Selects a kernel and runs it.
void gemm(Direction direction, const GemmTask& task);

// Gives up what kernels keep on the calling thread between tasks (the configuration of AMX tiles). Every thread that ran
// one calls it before other code may use the tiles: at the end of a phase (set_phase_end in kts/thread_pool.h).
void gemm_end_phase();

}  // namespace kts
