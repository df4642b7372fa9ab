// Prints, from CuTe's traits, which element of its matrix each register of a lane holds: "what lane register half row column".
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>

template <typename Layout>
void print_matrix(const char* name, Layout layout, int leading, bool transposed, int per_register) {
  for (int lane = 0; lane < 32; lane++)
    for (int value = 0; value < int(cute::size<1>(layout)); value++) {
      const int at = layout(lane, value), minor = at % leading, major = at / leading;
      std::printf("%s %d %d %d %d %d\n", name, lane, value / per_register, value % per_register, transposed ? major : minor,
                  transposed ? minor : major);
    }
}

// Bits of four 8 x 8 matrices, row after row as the source lanes point to them, to bits of the lanes' registers.
template <typename Operation>
void print_ldmatrix(const char* name) {
  const auto layout = typename cute::Copy_Traits<Operation>::DstLayout{};
  for (int lane = 0; lane < 32; lane++)
    for (int value = 0; value < 8; value++) {
      const int bit = layout(lane, value * 16), row = bit / 128, column = bit % 128 / 16;
      std::printf("%s %d %d %d %d %d\n", name, lane, row / 8, value % 2, row % 8, column);
    }
}

int main() {
  for (int format = 0; format < 2; format++) {
    const char* suffix = format ? "bf16" : "f16";
    char name[16];
    const auto print = [&](auto traits) {
      using Traits = decltype(traits);
      std::snprintf(name, sizeof name, "A.%s", suffix);
      print_matrix(name, typename Traits::ALayout{}, 16, false, 2);  // (M, K)
      std::snprintf(name, sizeof name, "B.%s", suffix);
      print_matrix(name, typename Traits::BLayout{}, 8, true, 2);  // (N, K)
      std::snprintf(name, sizeof name, "C.%s", suffix);
      print_matrix(name, typename Traits::CLayout{}, 16, false, 1);  // (M, N)
    };
    if (format)
      print(cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>{});
    else
      print(cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>{});
  }
  print_ldmatrix<cute::SM75_U32x4_LDSM_N>("ldmatrix");
  print_ldmatrix<cute::SM75_U16x8_LDSM_T>("ldmatrix.trans");
}
