# Warnings of our own host code; link privately.
add_library(dpfast_warnings INTERFACE)
target_compile_options(dpfast_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-psabi>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${DPFAST_WERROR}>>:-Werror>)
