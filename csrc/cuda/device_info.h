// Versions, for `dpfast doctor`.
#pragma once

#include <optional>
#include <string>

namespace dpfast::cuda {

std::string toolkit_version();
std::optional<std::string> driver_version();  // nothing where no driver is loaded

}  // namespace dpfast::cuda
