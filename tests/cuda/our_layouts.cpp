// Prints the same from csrc/emulator/fragments.h.
#include <cstdio>
#include <initializer_list>

#include "fragments.h"

int main() {
  using namespace emulator;
  const auto print = [](const char* name, const char* format, int lane, int reg, int half, Place at) {
    std::printf("%s%s %d %d %d %d %d\n", name, format, lane, reg, half, at.row, at.column);
  };
  for (int lane = 0; lane < 32; lane++)
    for (int reg = 0; reg < 4; reg++)
      for (int half = 0; half < 2; half++) {
        for (const char* format : {".f16", ".bf16"}) {
          print("A", format, lane, reg, half, a_place(lane, reg, half));
          if (reg < 2) print("B", format, lane, reg, half, b_place(lane, reg, half));
          if (half == 0) print("C", format, lane, reg, half, c_place(lane, reg));
        }
        print("ldmatrix", "", lane, reg, half, ldmatrix_place(lane, half, false));
        print("ldmatrix", ".trans", lane, reg, half, ldmatrix_place(lane, half, true));
      }
}
