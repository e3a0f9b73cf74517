# Decides whether the CUDA kernels are built, and for which architectures.
#
# Sets DPFAST_HAS_CUDA and DPFAST_CUDA_ARCHITECTURES_TEXT. CMAKE_CUDA_ARCHITECTURES overrides the
# choice: the GPU at hand, else 80, 90 and PTX for what comes later.
set(DPFAST_HAS_CUDA OFF)
if(NOT DPFAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "dpfast: DPFAST_CUDA must be AUTO, ON or OFF, got \"${DPFAST_CUDA}\"")
endif()
if(NOT DPFAST_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(DPFAST_HAS_CUDA ON)
  elseif(DPFAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "dpfast: DPFAST_CUDA=ON, but no CUDA compiler was found. Put nvcc on PATH, set CUDACXX to "
      "it, or build the CPU kernels alone with DPFAST_CUDA=OFF.")
  endif()
endif()

if(DPFAST_HAS_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities RESULT_VARIABLE failed ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    if(NOT failed AND capabilities)
      list(REMOVE_DUPLICATES capabilities)
      list(TRANSFORM capabilities REPLACE "\\." "")
      list(TRANSFORM capabilities APPEND "-real")
      set(CMAKE_CUDA_ARCHITECTURES ${capabilities})
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    endif()
  endif()
  enable_language(CUDA)
  string(REPLACE ";" " " DPFAST_CUDA_ARCHITECTURES_TEXT "${CMAKE_CUDA_ARCHITECTURES}")
  message(STATUS "dpfast: CUDA kernels for ${DPFAST_CUDA_ARCHITECTURES_TEXT}")
else()
  message(STATUS "dpfast: CPU kernels only")
endif()

function(dpfast_configure_cuda target)
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(${target} PUBLIC csrc)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall -Xcudafe=--display_error_number>)
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()
