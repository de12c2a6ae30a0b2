# Helpers that every folder uses: one library, one program or one test by line.
include(GNUInstallDirs)
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS C)

# pkg_check_modules(grpc) takes 11 s and lists dozens of absl libraries; these two suffice.
find_library(GRPC_LIBRARY grpc REQUIRED)
find_library(GPR_LIBRARY gpr REQUIRED)
find_library(DNNL_LIBRARY dnnl REQUIRED)
pkg_check_modules(PROTOBUF_C REQUIRED IMPORTED_TARGET libprotobuf-c)
pkg_check_modules(ROCKSDB REQUIRED IMPORTED_TARGET rocksdb)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(MICROHTTPD REQUIRED IMPORTED_TARGET libmicrohttpd)
pkg_check_modules(CRYPTO REQUIRED IMPORTED_TARGET libcrypto)
pkg_check_modules(CMOCKA IMPORTED_TARGET cmocka) # Of the tests alone: see the top folder.

add_library(redknot_flags INTERFACE)
target_include_directories(redknot_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_definitions(redknot_flags INTERFACE _GNU_SOURCE
  REDKNOT_VERSION="${PROJECT_VERSION}")
target_compile_options(redknot_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C>:-Wall;-Wextra;-Werror;-Wshadow;-Wstrict-prototypes;-Wmissing-prototypes;-Wvla;-Wundef;-Wwrite-strings;-fno-omit-frame-pointer>)
if(REDKNOT_SANITIZE)
  target_compile_options(redknot_flags INTERFACE -fsanitize=${REDKNOT_SANITIZE})
  target_link_options(redknot_flags INTERFACE -fsanitize=${REDKNOT_SANITIZE})
  if(REDKNOT_SANITIZE STREQUAL "thread") # It does not see fences; GCC warns of each.
    target_compile_options(redknot_flags INTERFACE $<$<COMPILE_LANGUAGE:C>:-Wno-tsan>)
  endif()
  string(REPLACE "," "_" sanitize_name ${REDKNOT_SANITIZE})
  target_compile_definitions(redknot_flags INTERFACE REDKNOT_SANITIZED=1
    REDKNOT_SANITIZE_${sanitize_name}=1)
endif()
if(REDKNOT_FUZZ)
  target_compile_options(redknot_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

# redknot_library(NAME SOURCES... [LINK libs...])
function(redknot_library name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_library(${name} STATIC ${ARG_UNPARSED_ARGUMENTS})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_link_libraries(${name} PUBLIC redknot_flags ${ARG_LINK})
endfunction()

# redknot_program(NAME SOURCES... [LINK libs...]): lands in <build>/bin.
function(redknot_program name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE redknot_flags ${ARG_LINK})
  install(TARGETS ${name} DESTINATION ${CMAKE_INSTALL_BINDIR})
endfunction()

# redknot_test(NAME SOURCES... [LINK libs...] [LABELS l...] [TIMEOUT s]): a cmocka
# program in ctest. Exit code 77: it was skipped (tests/support/skip.h). Label "fast": also run under the sanitizers.
function(redknot_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "LINK;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 60)
  endif()
  if(REDKNOT_SANITIZE) # Slower up to 15 times, beside whatever else runs.
    math(EXPR ARG_TIMEOUT "5 * ${ARG_TIMEOUT}")
  endif()
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_compile_definitions(${name} PRIVATE
    REDKNOT_SOURCE_DIR="${CMAKE_SOURCE_DIR}" REDKNOT_BINARY_DIR="${CMAKE_BINARY_DIR}")
  target_link_libraries(${name} PRIVATE redknot_flags ${ARG_LINK} PkgConfig::CMOCKA)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} SKIP_RETURN_CODE 77 LABELS "${ARG_LABELS}"
    ENVIRONMENT "TSAN_OPTIONS=ignore_noninstrumented_modules=1:suppressions=${CMAKE_SOURCE_DIR}/tests/support/tsan.supp;ASAN_OPTIONS=detect_leaks=1:intercept_tls_get_addr=0;LSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/support/lsan.supp;OMP_WAIT_POLICY=passive")
endfunction()

# redknot_fuzz(NAME SOURCES... [LINK libs...]): a libFuzzer program, with the fuzz preset only.
function(redknot_fuzz name)
  if(NOT REDKNOT_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz)
  target_link_libraries(${name} PRIVATE redknot_flags ${ARG_LINK})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()

# redknot_fuzz_seeds(FUZZ_NAME SOURCES...): a program that writes first inputs into a folder;
# tests/fuzz/run.sh calls it.
function(redknot_fuzz_seeds name)
  if(NOT REDKNOT_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_executable(${name}_seeds ${ARG_UNPARSED_ARGUMENTS})
  set_target_properties(${name}_seeds PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz/seeds)
  target_link_libraries(${name}_seeds PRIVATE redknot_flags ${ARG_LINK})
endfunction()

# redknot_link_standalone(TARGET): links what a machine with a GPU has not got, which is all our
# packages, statically or not at all: rk_base without hash.c, and the CUDA runtime.
function(redknot_link_standalone target)
  target_sources(${target} PRIVATE ${CMAKE_SOURCE_DIR}/common/base/hash_standalone.c)
  add_dependencies(${target} rk_base)
  target_link_libraries(${target} PRIVATE $<TARGET_FILE:rk_base> m)
  target_link_options(${target} PRIVATE -static-libgcc -static-libstdc++)
endfunction()
