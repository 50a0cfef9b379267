// A neighbour, not a dependency: torch's own OpenMP runtime.
#pragma once

namespace kts {

// Has the idle OpenMP threads of this process sleep instead of spinning, for milliseconds after every torch operation,
// on the cores that our workers need. For libgomp: it spins only briefly while it manages more threads than there are
// CPUs (GOMP_SPINCOUNT in its manual), so a team that does nothing is kept from the first call on. Does nothing without
// libgomp, or while OpenMP has one thread.
void calm_openmp_threads();

// From now on `calm_openmp_threads` does nothing: idle threads sleep anyway, or the user wants them to spin.
void leave_openmp_threads();

}  // namespace kts
