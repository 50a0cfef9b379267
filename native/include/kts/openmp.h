// A neighbour, not a dependency: torch's own OpenMP runtime.
#pragma once

namespace kts {

// Ends the idle OpenMP threads of the calling thread, if libgomp is in the process. They would spin on the cores that
// our workers need for milliseconds after every torch operation; libgomp starts them again when torch needs them (tens
// of microseconds each). Does nothing inside a parallel region, without libgomp, or where OMP_WAIT_POLICY or
// GOMP_SPINCOUNT have its idle threads sleep.
void rest_openmp_threads();

}  // namespace kts
