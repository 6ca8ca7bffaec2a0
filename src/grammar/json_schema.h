// JSON schema to a graph: the subset in docs/STRUCTURED_OUTPUT.md; everything else is an Error with the schema's path.
#pragma once

#include "base/json.h"
#include "grammar/graph.h"

namespace mm::grammar {

Graph compile_schema(const ordered_json& schema, const std::string& where);

}  // namespace mm::grammar
