# THE table ISA -> compile flags. kts_isa_sources(<isa> <files>...) gives files their flags and adds them to the kernel sources.
# g++ 12 reports its own AVX-512 headers as using uninitialised values; off for that ISA only.
set(KTS_FLAGS_scalar "")
set(KTS_FLAGS_avx2 "-mavx2;-mfma;-mf16c")
set(KTS_FLAGS_avx512 "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512;-Wno-maybe-uninitialized;-Wno-uninitialized")
set(KTS_FLAGS_avx512vnni "${KTS_FLAGS_avx512};-mavx512vnni")
set(KTS_FLAGS_avx512bf16 "${KTS_FLAGS_avx512};-mavx512bf16")
# AMX instructions are written as inline assembly (tile_op_hw.h), so no more than AVX-512 is asked of the compiler.
set(KTS_FLAGS_amx "${KTS_FLAGS_avx512}")

# Kernels that this CPU cannot run: instrumenting them would take most of the time of a sanitizer build.
set(KTS_UNINSTRUMENTED "")
if(KTS_SANITIZE AND EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo KTS_CPU_FLAGS REGEX "^flags" LIMIT_COUNT 1)
  if(NOT KTS_CPU_FLAGS MATCHES "avx512bw")
    set(KTS_UNINSTRUMENTED "^(avx512|amx)")
  endif()
endif()

set(KTS_ISA_SOURCES)
function(kts_isa_sources isa)
  set(flags ${KTS_FLAGS_${isa}})
  if(KTS_UNINSTRUMENTED AND isa MATCHES "${KTS_UNINSTRUMENTED}")
    list(APPEND flags -fno-sanitize=all)
  endif()
  foreach(file ${ARGN})
    set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
  set(KTS_ISA_SOURCES ${KTS_ISA_SOURCES} ${ARGN} PARENT_SCOPE)
endfunction()
