// The ops' schemas as constants, and the check that a C++ function takes what its schema says.
#pragma once

#include <string_view>

#include "op/schemas_text.h"  // kSchemasText: llama_adapter_kernels/ops/schemas.txt, put here by CMake
#include "op/tensors.h"

namespace lak {

// The schema of the op of this name: a line of the text.
consteval std::string_view schema_of(std::string_view name) {
  std::string_view rest = kSchemasText;
  while (!rest.empty()) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    if (line.starts_with(name) && line.size() > name.size() && line[name.size()] == '(') return line;
    rest.remove_prefix(line.size() < rest.size() ? line.size() + 1 : line.size());
  }
  return {};
}

template <class T>
constexpr std::string_view kSchemaType = "";
template <>
inline constexpr std::string_view kSchemaType<Tensor> = "Tensor";
template <>
inline constexpr std::string_view kSchemaType<OptionalTensor> = "Tensor?";
template <>
inline constexpr std::string_view kSchemaType<int64_t> = "SymInt";
template <>
inline constexpr std::string_view kSchemaType<double> = "float";
template <>
inline constexpr std::string_view kSchemaType<bool> = "bool";

// Whether the function's parameters are the schema's, by type and number. torch calls a boxed function without checking.
template <class Result, class... Parameters>
consteval bool takes(Result (*)(Parameters...), std::string_view schema) {
  std::string_view rest = schema.substr(schema.find('(') + 1);
  const auto next_is = [&rest](std::string_view type) {
    const bool same = !type.empty() && rest.starts_with(type) && rest[type.size()] == ' ';
    const size_t end = rest.find_first_of(",)");
    rest.remove_prefix(rest[end] == ',' ? end + 2 : end);
    return same;
  };
  return (next_is(kSchemaType<Parameters>) && ...) && rest.starts_with(")");
}

}  // namespace lak
