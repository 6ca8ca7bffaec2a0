// JSON schemas: whatever is drawn through the masks is valid JSON and a valid instance; given texts are in or out; what
// is not supported is refused with its path.
#include <chrono>

#include "grammar/grammar_test_util.h"
#include "grammar/schema_validator.h"

namespace mm {

namespace {

const char* const kSchemas[] = {
    R"({})",
    R"(true)",
    R"({"type":"object"})",
    R"({"type":"array"})",
    R"({"type":"string"})",
    R"({"type":"number"})",
    R"({"type":"integer"})",
    R"({"type":"boolean"})",
    R"({"type":"null"})",
    R"({"type":["string","null"],"maxLength":3})",
    R"({"type":["integer","array","boolean"],"minimum":5,"maxItems":2})",
    R"({"type":"object","properties":{"name":{"type":"string","description":"x"},"age":{"type":"integer"}},"required":["name","age"],"additionalProperties":false})",
    R"({"type":"object","properties":{"a":{"type":"null"},"b":{"type":"boolean"},"c":{"type":"integer"}},"required":["b"]})",
    R"({"type":"object","properties":{"a":{},"b":{},"c":{}}})",
    R"({"properties":{"a":{"type":"integer"},"ab":{"type":"null"},"é\"\n":{"type":"null"}},"additionalProperties":{"type":"string"},"required":["ab"]})",
    R"({"type":"object","properties":{"a":{"type":"integer"}},"additionalProperties":true,"required":["z"]})",
    R"({"type":"object","additionalProperties":{"type":"integer","minimum":1,"maximum":3}})",
    R"({"type":"object","required":["x","y"]})",
    R"({"type":"object","properties":{}})",
    R"({"enum":["red","green","blue","gr",1,-2.5,null,true,[1,{"a":"b"}],{"k":[]}]})",
    R"({"type":"string","enum":["a","ab","abc","b\"","\u00e9\n"]})",
    R"({"const":{"a":[1,2,{"b":null}]}})",
    R"({"type":"integer","enum":[1,2.0,2.5,"x"]})",
    R"({"type":"array","items":{"type":"integer"},"minItems":2,"maxItems":4})",
    R"({"type":"array","prefixItems":[{"type":"string"},{"type":"integer"}]})",
    R"({"type":"array","prefixItems":[{"type":"string"},{"type":"integer"}],"items":{"type":"null"},"minItems":1,"maxItems":5})",
    R"({"type":"array","prefixItems":[{"type":"string"},{"type":"integer"}],"items":false,"minItems":2})",
    R"({"type":"array","items":{"type":"array","items":{"type":"boolean"},"maxItems":2},"maxItems":3})",
    R"({"type":"array","maxItems":0})",
    R"({"type":"string","minLength":3,"maxLength":5})",
    R"({"type":"string","minLength":3})",
    R"({"type":"string","pattern":"^[a-z]{2,4}-\\d+$"})",
    R"({"type":"string","pattern":"b+\"?c"})",
    R"({"type":"string","pattern":"^(ab|c)*$","minLength":3,"maxLength":7})",
    R"({"type":"string","pattern":"x","minLength":2,"maxLength":4})",
    R"({"type":"string","pattern":"^a|b$","maxLength":6})",
    R"({"type":"string","format":"date"})",
    R"({"type":"string","format":"time"})",
    R"({"type":"string","format":"date-time"})",
    R"({"type":"string","format":"uuid"})",
    R"({"type":"string","format":"email"})",
    R"({"type":"string","format":"ipv4"})",
    R"({"type":"string","format":"ipv6"})",
    R"({"type":"string","format":"hostname"})",
    R"({"type":"string","format":"uri"})",
    R"({"type":"string","format":"duration"})",
    R"({"type":"string","format":"date","pattern":"^20[0-9]{2}-0[1-3]"})",
    R"({"type":"string","format":"email","maxLength":14})",
    R"({"type":"integer","minimum":-5,"maximum":1234})",
    R"({"type":"integer","exclusiveMinimum":99,"exclusiveMaximum":102})",
    R"({"type":"integer","minimum":0.5,"maximum":10.5})",
    R"({"type":"integer","maximum":-17})",
    R"({"type":"integer","minimum":123456789012})",
    R"({"type":"integer","minimum":-1e30,"maximum":1e30})",
    R"({"type":"number","minimum":0,"maximum":1})",
    R"({"type":"number","exclusiveMinimum":-0.25,"exclusiveMaximum":0.125})",
    R"({"type":"number","exclusiveMinimum":99.5,"maximum":1000.25})",
    R"({"type":"number","maximum":-3.5})",
    R"({"type":"number","exclusiveMinimum":0})",
    R"({"type":"number","exclusiveMinimum":12345678,"exclusiveMaximum":12345679})",
    R"({"type":"number","minimum":2.5,"maximum":2.5})",
    R"({"anyOf":[{"type":"integer"},{"type":"object","properties":{"a":{"type":"null"}},"required":["a"]}]})",
    R"({"oneOf":[{"type":"object","properties":{"kind":{"const":"cat"},"lives":{"type":"integer"}},"required":["kind","lives"]},{"type":"object","properties":{"kind":{"const":"dog"},"good":{"type":"boolean"}},"required":["kind"]}]})",
    R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"integer"}},"anyOf":[{"required":["a"]},{"required":["b"]}]})",
    R"({"allOf":[{"type":"object","properties":{"a":{"type":"integer","minimum":1}},"required":["a"]},{"properties":{"b":{"type":"string"},"a":{"maximum":3}},"required":["b"]}]})",
    R"({"allOf":[{"properties":{"a":{"type":"integer"}},"additionalProperties":false},{"properties":{"b":{"type":"string"}}}]})",
    R"({"allOf":[{"$ref":"#/$defs/x"},{"maxLength":4}],"$defs":{"x":{"type":"string","minLength":2}}})",
    R"({"$ref":"#/$defs/p","$defs":{"p":{"type":"object","properties":{"q":{"$ref":"#/$defs/q"},"r":{"$ref":"#/$defs/q"}},"required":["q","r"]},"q":{"type":"integer","minimum":10,"maximum":20}}})",
    R"({"$ref":"#/$defs/node","$defs":{"node":{"type":"object","properties":{"value":{"type":"integer"},"next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["value","next"]}}})",
    R"({"type":"object","properties":{"name":{"type":"string","maxLength":5},"children":{"type":"array","items":{"$ref":"#"},"maxItems":2}},"required":["name","children"]})",
    R"({"definitions":{"a/b~c d":{"type":"boolean"}},"type":"array","items":{"$ref":"#/definitions/a~1b~0c d"},"maxItems":4})",
    R"({"type":"object","properties":{"a":false,"b":{"type":"null"}}})",
    R"({"title":"T","description":"d","default":1,"examples":[1],"$schema":"x","$id":"y","$comment":"c","deprecated":true,"type":"integer"})",
    R"({"type":"object","properties":{"list":{"$ref":"#/$defs/expr"}},"required":["list"],"$defs":{"expr":{"anyOf":[{"type":"integer"},{"type":"array","items":{"$ref":"#/$defs/expr"},"minItems":1}]}}})",
};

void expect_valid_walks(const TokenTable& table, int rounds) {
  int index = 0;
  for (const char* text : kSchemas) {
    const ordered_json schema = parse_json(text, "test");
    const auto grammar = Grammar::json_schema(schema, "schema");
    const SchemaValidator validator(schema);
    Rng rng{7, static_cast<uint64_t>(index++)};
    for (int round = 0; round < rounds; round++) {
      const std::string drawn = random_text(grammar, table, rng, 5 + static_cast<int>(rng.below(60)));
      ordered_json value;
      ASSERT_NO_THROW(value = ordered_json::parse(drawn)) << text << "\n" << drawn.substr(0, 1000);
      ASSERT_TRUE(validator.valid(value)) << text << "\n" << drawn.substr(0, 1000);
    }
  }
  EXPECT_GT(index, 60);
}

}  // namespace

TEST(JsonSchema, WalksByBytesAreValidInstances) { expect_valid_walks(byte_table(), 25); }

TEST(JsonSchema, WalksByTokensAreValidInstances) {
  const auto tokens = minimind_tokens();
  MM_REQUIRE_TOKENIZER(tokens);
  expect_valid_walks(TokenTable(tokens), 12);
}

TEST(JsonSchema, TextsInAndOut) {
  const struct {
    const char* schema;
    std::vector<const char*> in, out;
  } cases[] = {
      {R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"string"}},"required":["a"]})",
       {R"({"a":1})", R"({"a": 1, "b": "x"})", R"({"a":-10,"b":""})"},
       {R"({})", R"({"b":"x"})", R"({"b":"x","a":1})", R"({"a":1,})", R"({"a":1,"c":1})", R"({ "a":1})", R"({"a":  1})",
        R"({"a":01})", R"({"a":-0})", R"({"a":1)", R"({"a":1,"a":1})", R"({"a":1.0})"}},
      {R"({"type":"string"})",
       {R"("")", R"("\u00e9\n\/\ud83d\ude00")", "\"\xC3\xA9\xF0\x9F\x98\x80\x7F\"", R"("\uD83D\uDE00")"},
       {R"("\ud83d")", R"("\ude00")", R"("\ud83d\u0041")", "\"\n\"", "\"\xC3\"", "\"\xED\xA0\x80\"", "\"\xC0\x80\"",
        "\"\xF4\x90\x80\x80\"", R"("\x41")", R"("\u12")", "\""}},
      {R"({"type":"number"})",
       {"0", "-0", "1.5", "-12.25e-3", "1E+5", "123456789012345"},
       {"", "-", "01", "1.", ".5", "+1", "1e", "1e100", "1234567890123456", "NaN", "0x1"}},
      {R"({"type":"integer","minimum":-128,"maximum":127})",
       {"-128", "-100", "-1", "0", "9", "10", "99", "100", "127"},
       {"-129", "-200", "128", "130", "200", "1000", "-0", "00", "-"}},
      {R"({"type":"integer","minimum":0.5,"exclusiveMaximum":3})", {"1", "2"}, {"0", "3", "-1"}},
      {R"({"type":"integer","maximum":-0.5,"minimum":-2.5})", {"-1", "-2"}, {"0", "-3"}},
      {R"({"type":"number","exclusiveMinimum":-0.5,"maximum":1.25})",
       {"0", "0.0", "-0.4999", "1.25", "1.250", "1", "-0.1", "1.2499"},
       {"-0.5", "-0.50", "1.251", "1.3", "2", "-1", "-0.6", "1e0", "-0"}},
      {R"({"type":"string","pattern":"a\\nb"})", {R"("a\nb")", R"("xa\nby")"}, {R"("a\u000ab")", R"("anb")"}},
      {R"({"type":"string","pattern":"^.$"})", {"\"a\"", "\"\xE4\xB8\xAD\"", R"("\"")"}, {"\"ab\"", "\"\"", R"("\n")"}},
      {R"({"type":"string","maxLength":2})",
       {"\"\xE4\xB8\xAD\xF0\x9F\x98\x80\"", R"("\u4e2d\ud83d\ude00")"},
       {R"("abc")"}},
      {R"({"type":"string","format":"date"})",
       {R"("2024-02-29")", R"("2000-02-29")", R"("1999-12-31")"},
       {R"("2023-02-29")", R"("1900-02-29")", R"("2024-04-31")", R"("2024-13-01")", R"("0000-01-01")",
        R"("2024-1-1")"}},
      {R"({"additionalProperties":{"type":"integer"},"properties":{"ab":{"type":"null"}}})",
       {R"({})", R"({"ab":null})", R"({"a":1})", R"({"abc":1,"b":2})", R"({"ab":null,"":1})"},
       {R"({"ab":1})", R"({"a":null})", R"({"\u0061b":1})", R"({"a":1,"ab":null})"}},
      {R"({"enum":["a","ab",1,10]})", {R"("a")", R"("ab")", "1", "10"}, {R"("abc")", R"("")", "100", R"("\u0061")"}},
      {R"({"type":"array","prefixItems":[{"const":1},{"const":2}]})",
       {"[]", "[1]", "[1,2]", "[1, 2]"},
       {"[1,2,3]", "[2]", "[1 ,2]"}},
  };
  for (const auto& c : cases) {
    const auto grammar = schema_of(c.schema);
    for (const char* text : c.in) EXPECT_TRUE(matches(grammar, text)) << c.schema << "  " << text;
    for (const char* text : c.out) EXPECT_FALSE(matches(grammar, text)) << c.schema << "  " << text;
  }
}

TEST(JsonSchema, IntegerBoundsExhaustively) {
  Rng rng{3, 1};
  for (int round = 0; round < 60; round++) {
    const int64_t low = static_cast<int64_t>(rng.below(3000)) - 1500,
                  high = low + static_cast<int64_t>(rng.below(1200)) - 20;
    const ordered_json schema{{"type", "integer"}, {"minimum", low}, {"maximum", high}};
    if (low > high) {
      EXPECT_NE(error_of([&] { Grammar::json_schema(schema); }), "");
      continue;
    }
    const auto grammar = Grammar::json_schema(schema);
    for (int64_t v = low - 120; v <= high + 120; v++)
      ASSERT_EQ(matches(grammar, std::to_string(v)), v >= low && v <= high) << v << " in " << low << " to " << high;
  }
}

TEST(JsonSchema, NumberBoundsAgainstDoubles) {
  Rng rng{4, 1};
  for (int round = 0; round < 60; round++) {
    const auto units = static_cast<double>(rng.below(4000)) - 2000, more = static_cast<double>(rng.below(400));
    const double low = units / 80, high = (units + more) / 80;
    const bool open_low = rng.below(2) == 0, open_high = rng.below(2) == 0;
    const ordered_json schema{{"type", "number"},
                              {open_low ? "exclusiveMinimum" : "minimum", low},
                              {open_high ? "exclusiveMaximum" : "maximum", high}};
    if (low == high && (open_low || open_high)) continue;
    const auto grammar = Grammar::json_schema(schema);
    for (int i = 0; i < 300; i++) {
      const std::string text =
          fmt::format("{:.{}f}", low + (static_cast<double>(rng.below(1000)) / 500 - 0.5) * (high - low + 0.1),
                      static_cast<int>(rng.below(5)));
      const double v = std::stod(text);
      if (v == 0 && text[0] == '-') continue;  // -0 is written in no bounded number
      ASSERT_EQ(matches(grammar, text), (open_low ? v > low : v >= low) && (open_high ? v < high : v <= high))
          << text << " in " << schema.dump();
    }
  }
}

TEST(JsonSchema, RefusedWithThePath) {
  const struct {
    const char* schema;
    const char* path;
  } cases[] = {
      {R"({"type":"object","properties":{"age":{"not":{"type":"string"}}}})", "schema.properties.age.not"},
      {R"({"type":"array","items":{"type":"array","uniqueItems":true}})", "schema.items.uniqueItems"},
      {R"({"type":"array","contains":{}})", "schema.contains"},
      {R"({"patternProperties":{"a":{}}})", "schema.patternProperties"},
      {R"({"if":{},"then":{}})", "schema.if"},
      {R"({"multipleOf":2})", "schema.multipleOf"},
      {R"({"minProperties":2})", "schema.minProperties"},
      {R"({"anyOf":[{"type":"null"},{"type":"string","format":"regex"}]})", "schema.anyOf.1.format"},
      {R"#({"type":"string","pattern":"(?=a)"})#", "schema.pattern"},
      {R"({"type":"string","pattern":"a\\1"})", "schema.pattern"},
      {R"({"type":"strin"})", "schema.type"},
      {R"({"type":["string",3]})", "schema.type"},
      {R"({"properties":{"a":3}})", "schema.properties.a"},
      {R"({"properties":[]})", "schema.properties"},
      {R"({"required":"a"})", "schema.required"},
      {R"({"minLength":-1})", "schema.minLength"},
      {R"({"maxItems":1.5})", "schema.maxItems"},
      {R"({"minimum":"1"})", "schema.minimum"},
      {R"({"exclusiveMinimum":true})", "schema.exclusiveMinimum"},
      {R"({"items":[{}]})", "schema.items"},
      {R"({"enum":[]})", "schema.enum"},
      {R"({"enum":["a"],"minLength":3})", "schema.minLength"},
      {R"({"anyOf":{}})", "schema.anyOf"},
      {R"({"$ref":"#/$defs/none"})", "schema.$ref"},
      {R"({"$ref":"http://x/y"})", "schema.$ref"},
      {R"({"properties":{"a":{"$ref":"#/properties/a"}},"required":["a"]})", "schema.properties.a"},
      {R"({"$ref":"#"})", "schema"},
      {R"({"allOf":[{"$ref":"#"}]})", "schema.allOf.0"},
      {R"({"anyOf":[{"$ref":"#"},{"type":"null"}]})", "schema"},
      {R"({"allOf":[{"pattern":"a"},{"pattern":"b"}]})", "schema.pattern"},
      {R"({"$defs":{"x":{"not":{}}},"items":{"$ref":"#/$defs/x"}})", "schema.$defs.x.not"},
      {R"({"type":"object","properties":{"a":{"$ref":"#"}},"required":["a"]})", "schema"},
      {R"({"type":"integer","minimum":3,"maximum":2})", "schema"},
      {R"({"type":"string","pattern":"^a$","minLength":2})", "schema"},
      {R"(false)", "schema"},
      {R"(3)", "schema"},
      {R"({"type":"string","const":1})", "schema"},
      {R"({"type":"number","minimum":0.1234567890123456})", "schema.minimum"},
  };
  for (const auto& c : cases) {
    const std::string error = error_of([&] { schema_of(c.schema); });
    EXPECT_TRUE(error.starts_with(std::string(c.path) + ":")) << c.schema << "\n" << error;
  }
}

// Whatever is asked for: an answer or an Error, quickly.
TEST(JsonSchema, HostileSchemas) {
  std::string nested = "{}", values = "1";
  for (int i = 0; i < 50; i++) nested = fmt::format(R"({{"type":"array","minItems":1,"items":{}}})", nested);
  std::string chain = R"({"$ref":"#/$defs/d0","$defs":{)";
  for (int i = 0; i < 60; i++)
    chain += fmt::format(R"("d{}":{{"anyOf":[{{"$ref":"#/$defs/d{}"}},{{"$ref":"#/$defs/d{}","description":"x"}}]}},)",
                         i, i + 1, i + 1);
  chain += R"("d60":{"type":"null"}}})";
  std::string doubled = R"({"$ref":"#/$defs/d0","$defs":{)";
  for (int i = 0; i < 60; i++)
    doubled +=
        fmt::format(R"("d{}":{{"allOf":[{{"$ref":"#/$defs/d{}"}},{{"$ref":"#/$defs/d{}"}}]}},)", i, i + 1, i + 1);
  doubled += R"("d60":{"type":"null"}}})";
  for (int i = 0; i < 20000; i++) values += ",\"value number " + std::to_string(i * 7919 % 20011) + "\"";
  std::string optional = R"({"type":"object","properties":{"p":{})";
  for (int i = 0; i < 900; i++) optional += fmt::format(R"(,"p{}":{{"type":"integer"}})", i);
  const std::string growing =
      R"({"$ref":"#/$defs/a","$defs":{"a":{"properties":{"x":{"allOf":[{"$ref":"#/$defs/a"},{"$ref":"#/$defs/b"}]}}},
                                  "b":{"properties":{"x":{"allOf":[{"$ref":"#/$defs/b"},{"$ref":"#/$defs/a"}]},"y":{}}}}})";
  const std::vector<std::pair<std::string, bool>> cases = {
      {nested, true},
      {chain, true},
      {doubled, false},
      {R"({"enum":[)" + values + "]}", true},
      {optional + "}}", true},
      {growing, false},
      {R"#({"type":"string","pattern":"^(a{1000}){1000}$"})#", true},
      {R"({"type":"string","pattern":"(a{1000}){1000}","maxLength":5})", false},
      {R"({"type":"string","pattern":"^((a?){1000}){1000}$"})", true},
      {R"({"type":"string","pattern":".*[a-m].{1000}","maxLength":2000})", false},
      {R"({"type":"string","minLength":2147483647})", true},
      {R"({"type":"array","minItems":4000000000})", true},
      {R"({"type":"string","pattern":")" + std::string(5000, '(') + R"("})", false},
      {R"({"type":"string","pattern":")" + std::string(15000, '.') + R"("})", true},
  };
  const TokenTable table = byte_table();
  for (const auto& c : cases) {
    const std::string& text = c.first;
    const auto begin = std::chrono::steady_clock::now();
    GrammarPtr grammar;
    const std::string error = error_of([&] { grammar = schema_of(text); });
    EXPECT_EQ(error.empty(), c.second) << text.substr(0, 200) << "\n" << error;
    if (grammar) {
      GrammarState state(grammar, table);
      Rng rng{5, 5};
      for (int step = 0; step < 300; step++) {
        const auto bits = mask_of(state, table);
        int32_t id = 0;
        for (int32_t tries = 0; tries < 2000 && (id == 0 || !bit(bits, id)); tries++)
          id = 1 + static_cast<int32_t>(rng.below(256));
        if (id == 0 || !state.accept(id)) break;
      }
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_LT(seconds, 5) << text.substr(0, 200);
    std::printf("  %.3f s  %s%s\n", seconds, text.substr(0, 60).c_str(),
                error.empty() ? "" : ("  -> " + error.substr(0, 120)).c_str());
  }
}

}  // namespace mm
