// The part of the interface that launches nothing: the version, and errors in words.

#include <stdarg.h>
#include <stdio.h>

#include "host.h"

namespace sra {
namespace {

thread_local char last_error[512];

}  // namespace

int refuse(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}

}  // namespace sra

int sra_version(void) { return SRA_VERSION; }

const char* sra_last_error(void) { return sra::last_error; }

const char* sra_error_string(int code) {
  switch (code) {
    case SRA_OK:
      return "no error";
    case SRA_NULL_POINTER:
      return "a pointer that must be given is NULL";
    case SRA_BAD_SIZE:
      return "a size is out of range";
    case SRA_BAD_STRIDE:
      return "a row's stride is not a multiple of 16 bytes";
    case SRA_MISALIGNED:
      return "a pointer is not aligned";
    case SRA_UNSUPPORTED:
      return "no kernel does this";
    default:
      return code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "unknown error code";
  }
}
