// Declares the ops. Each backend's library brings implementations (op/bind.h).
#include "op/schema.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "op/library_name.h"

STABLE_TORCH_LIBRARY(LAK_LIBRARY, m) {
  for (const std::string_view schema : {lak::schema_of("forward"), lak::schema_of("backward"), lak::schema_of("decode")}) {
    m.def(std::string(schema).c_str());
  }
}
