// The chat page: the files of web/, embedded at build time (cmake/page.cmake), so that the binary needs nothing beside
// it.
#pragma once

#include <string_view>

namespace mm {

struct PageFile {
  std::string_view path;  // "/chat.js"
  std::string_view mime;  // "text/javascript; charset=utf-8"
  std::string_view body;  // UTF-8 text
  std::string_view etag;  // of the content, quoted, as the header has it
};

// nullptr when the page has no such file. "/" is index.html, which has no other path. Static memory; any thread.
const PageFile* find_page_file(std::string_view path);

// Content-Security-Policy to be sent with the page's files: nothing from elsewhere, no inline code or style, and no
// text turned into HTML, even if a bug in the page would try.
inline constexpr std::string_view kPageSecurityPolicy =
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'";

}  // namespace mm
