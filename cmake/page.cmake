# The chat page in the binary. Included by CMakeLists.txt it makes the library mm_page out of web/*; run as a script
# (cmake -DWEB=web -DOUT=page_files.cpp -P cmake/page.cmake) it writes the one source file of that library.
if(NOT CMAKE_SCRIPT_MODE_FILE)
  file(GLOB page_files CONFIGURE_DEPENDS web/*)
  set(page_source ${CMAKE_BINARY_DIR}/page_files.cpp)
  add_custom_command(OUTPUT ${page_source} VERBATIM
                     COMMAND ${CMAKE_COMMAND} -DWEB=${CMAKE_SOURCE_DIR}/web -DOUT=${page_source} -P ${CMAKE_CURRENT_LIST_FILE}
                     DEPENDS ${page_files} ${CMAKE_CURRENT_LIST_FILE} COMMENT "Embedding web/")
  add_library(mm_page STATIC ${page_source})
  target_include_directories(mm_page PUBLIC src)
  return()
endif()

set(mime_html "text/html; charset=utf-8")
set(mime_css "text/css; charset=utf-8")
set(mime_js "text/javascript; charset=utf-8")
set(mime_svg "image/svg+xml")
set(entries "")
file(GLOB files ${WEB}/*)
list(SORT files)
foreach(file ${files})
  get_filename_component(name ${file} NAME)
  get_filename_component(extension ${file} LAST_EXT)
  string(SUBSTRING ${extension} 1 -1 extension)
  if(NOT DEFINED mime_${extension})
    message(FATAL_ERROR "web/${name}: cmake/page.cmake knows no MIME type of .${extension}; add it there")
  endif()
  file(READ ${file} body)
  # Indentation, empty lines and lines of comment stay here: no script or style of the page has a string of several lines.
  string(REGEX REPLACE "\n[ \n]+" "\n" body "\n${body}")
  string(REGEX REPLACE "\n(//[^\n]*|/\\*[^\n]*\\*/)" "" body "${body}")
  string(SUBSTRING "${body}" 1 -1 body)
  string(FIND "${body}" ")mmpage\"" end)
  file(SIZE ${file} size)
  if(NOT end EQUAL -1 OR size EQUAL 0)
    message(FATAL_ERROR "web/${name}: empty, or it contains the end mark of its C++ string")
  endif()
  file(SHA256 ${file} hash)
  string(SUBSTRING ${hash} 0 16 hash)
  if(name STREQUAL "index.html")
    set(name "")
  endif()
  string(APPEND entries "    {\"/${name}\", \"${mime_${extension}}\", R\"mmpage(${body})mmpage\"sv, \"\\\"${hash}\\\"\"},\n")
endforeach()
if(entries STREQUAL "")
  message(FATAL_ERROR "no files in ${WEB}")
endif()
file(WRITE ${OUT} "// Made of web/ by cmake/page.cmake.
#include \"serve/page.h\"

namespace mm {
using namespace std::string_view_literals;
static constexpr PageFile kFiles[] = {
${entries}};

const PageFile* find_page_file(std::string_view path) {
  for (const PageFile& file : kFiles)
    if (file.path == path) return &file;
  return nullptr;
}

}  // namespace mm
")
