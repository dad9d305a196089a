# The CUDA kernels: LLMBUILDER_CUDA=AUTO builds them where a fit nvcc is found and does without where not, ON insists on
# them, OFF leaves them out. No torch is needed for them, no GPU and no driver.
#
# AUTO builds for the GPUs of this machine, and where there is none PTX alone, which a driver compiles at first use: an
# install stays quick. ON builds for all that the kernels were written for. LLMBUILDER_CUDA_ARCHITECTURES=80,90 chooses.
# PTX for compute capability 8.0 is always there, so that every later GPU has something to run. Both settings are read
# from the environment too, so that `LLMBUILDER_CUDA=ON pip install .` does what it says.
#
# Sets CUDA_KERNELS to whether they are built, and CUDA_WHY_NOT to the reason why not, which `llmbuilder doctor` tells.
set(LLMBUILDER_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(LLMBUILDER_CUDA_ARCHITECTURES "" CACHE STRING "Compute capabilities to build for, as 80,90; empty: see cmake/cuda.cmake")
foreach(SETTING LLMBUILDER_CUDA LLMBUILDER_CUDA_ARCHITECTURES)
  if(DEFINED ENV{${SETTING}})
    set(${SETTING} "$ENV{${SETTING}}" CACHE STRING "" FORCE)
  endif()
endforeach()
set_property(CACHE LLMBUILDER_CUDA PROPERTY STRINGS AUTO ON OFF)
set(WRITTEN_FOR 80 86 89 90 100 120)

set(CUDA_KERNELS FALSE)
set(CUDA_WHY_NOT "")

# Leaves the CUDA kernels out for this reason, or stops where they are asked for.
macro(without_cuda REASON)
  set(CUDA_WHY_NOT "${REASON}")
  if(LLMBUILDER_CUDA STREQUAL "ON")
    message(FATAL_ERROR "llmbuilder: LLMBUILDER_CUDA=ON, but ${CUDA_WHY_NOT}")
  endif()
  message(STATUS "llmbuilder: no CUDA kernels: ${CUDA_WHY_NOT}")
endmacro()

# Whether nvcc with this C++ compiler makes a program for a compute capability, of the kernels' headers and with the static
# runtime; its words in WORDS where it does not.
# enable_language(CUDA) cannot be asked: where nvcc and the C++ compiler do not fit it stops the whole configuration.
function(compiles_for ARCHITECTURE RESULT WORDS)
  set(PROBE ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe.cu)
  file(WRITE ${PROBE} "#include \"cuda/partials.h\"\n#include \"cuda/reduce.h\"\n#include \"cuda/staged.h\"\n"
                      "__global__ void probe(int* out) { *out = 1; }\n"
                      "int main() { probe<<<1, 1>>>(nullptr); }\n")
  execute_process(
    COMMAND ${NVCC} -std=c++17 -ccbin ${CMAKE_CXX_COMPILER} -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
            -I${CMAKE_CURRENT_SOURCE_DIR}/csrc/include -arch=sm_${ARCHITECTURE} ${PROBE} -o ${PROBE}.out
    RESULT_VARIABLE FAILED OUTPUT_VARIABLE OUT ERROR_VARIABLE ERR)
  string(REGEX REPLACE "[^A-Za-z0-9 .,:!()=+/_-]+" " " OUT "${OUT}${ERR}")  # what a string in C++ can hold as it is
  string(SUBSTRING "${OUT}" 0 300 OUT)
  if(FAILED)
    set(${RESULT} FALSE PARENT_SCOPE)
  else()
    set(${RESULT} TRUE PARENT_SCOPE)
  endif()
  set(${WORDS} "${OUT}" PARENT_SCOPE)
endfunction()

# Compute capabilities of the GPUs here, as 80;90; empty where there is none.
function(present_gpus RESULT)
  set(FOUND "")
  find_program(NVIDIA_SMI nvidia-smi)
  if(NVIDIA_SMI)
    execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE OUT ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" FOUND "${OUT}")
    string(REPLACE "." "" FOUND "${FOUND}")
    list(REMOVE_DUPLICATES FOUND)
  endif()
  set(${RESULT} "${FOUND}" PARENT_SCOPE)
endfunction()

if(LLMBUILDER_CUDA STREQUAL "OFF")
  without_cuda("this build was told LLMBUILDER_CUDA=OFF")
else()
  find_program(NVCC nvcc HINTS ENV CUDACXX PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT NVCC)
    without_cuda("no nvcc was found when it was built (it comes with NVIDIA's CUDA toolkit)")
  else()
    compiles_for(80 CUDA_KERNELS WORDS)
    if(NOT CUDA_KERNELS)
      without_cuda("${NVCC} with ${CMAKE_CXX_COMPILER} could not compile for compute capability 8.0: ${WORDS}")
    endif()
  endif()
endif()

if(CUDA_KERNELS)
  string(REPLACE "," ";" WANTED "${LLMBUILDER_CUDA_ARCHITECTURES}")
  if(NOT WANTED AND LLMBUILDER_CUDA STREQUAL "ON")
    set(WANTED ${WRITTEN_FOR})
  elseif(NOT WANTED)
    present_gpus(WANTED)
  endif()
  # CUDA C++ becomes PTX once, for 8.0, and that the code of each: the kernels use nothing that came later, and a
  # translation for each would take six times as long.
  set(CODE compute_80)
  foreach(ARCHITECTURE IN LISTS WANTED)
    if(ARCHITECTURE LESS 80)
      continue()  # the kernels need 8.0
    endif()
    compiles_for(${ARCHITECTURE} FIT WORDS)
    if(FIT)
      string(APPEND CODE ",sm_${ARCHITECTURE}")
    else()
      message(STATUS "llmbuilder: ${NVCC} makes no code for ${ARCHITECTURE}, which will run the PTX: ${WORDS}")
    endif()
  endforeach()
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # before the target exists
  string(APPEND CMAKE_CUDA_FLAGS " \"--generate-code=arch=compute_80,code=[${CODE}]\"")
  set(CMAKE_CUDA_COMPILER ${NVCC})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "llmbuilder: CUDA kernels by nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CODE}")
endif()
