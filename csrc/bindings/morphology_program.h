// The whole numbers and the others in which dpfast/ops/_morphology_program.py writes a call down.
#pragma once

#include <cstdint>
#include <vector>

#include "math/morphology.h"

namespace dpfast::bindings {

// Everything but the tensors. Throws std::invalid_argument where the numbers make no sense.
Morphology read_morphology(const std::vector<std::int64_t>& shape,
                           const std::vector<std::int64_t>& program,
                           const std::vector<double>& values);

}  // namespace dpfast::bindings
