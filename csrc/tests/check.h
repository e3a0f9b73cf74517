// A check that names its place and lets the rest run; main() returns failures().
#pragma once

#include <cstdio>

namespace dpfast::tests {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check(bool passed, const char* what, const char* file, int line) {
  if (passed) return;
  ++failures();
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
}

inline int report(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures() == 0 ? "passed" : "FAILED", failures());
  return failures() == 0 ? 0 : 1;
}

}  // namespace dpfast::tests

#define DPFAST_CHECK(condition) ::dpfast::tests::check((condition), #condition, __FILE__, __LINE__)
