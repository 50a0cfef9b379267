# THE table ISA -> compile flags. kts_isa_sources(<isa> <files>...) gives files their flags and adds them to the kernel sources.
# g++ 12 reports its own AVX-512 headers as using uninitialised values; off for that ISA only.
set(KTS_FLAGS_scalar "")
set(KTS_FLAGS_avx2 "-mavx2;-mfma")
set(KTS_FLAGS_avx512 "-mavx2;-mfma;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512;-Wno-maybe-uninitialized;-Wno-uninitialized")

set(KTS_ISA_SOURCES)
function(kts_isa_sources isa)
  foreach(file ${ARGN})
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${KTS_FLAGS_${isa}}")
  endforeach()
  set(KTS_ISA_SOURCES ${KTS_ISA_SOURCES} ${ARGN} PARENT_SCOPE)
endfunction()
