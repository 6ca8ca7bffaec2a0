#include "cli/command.h"

namespace mm {

void add_device_flags(CLI::App* command, DeviceOptions& o, bool naive) {
  command->add_option("--device", o.device, "auto (a GPU if one is usable), cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->group("Device");
  command
      ->add_option("--dtype", o.dtype,
                   "auto (f32 on the CPU, bf16 on a GPU), f32, bf16, or f16 (GPU). On the CPU the operands of matrix "
                   "products, bf16 with AVX-512 BF16; on a GPU activations and working weights, masters stay f32")
      ->check(CLI::IsMember({"auto", "f32", "bf16", "f16"}))
      ->group("Device");
  if (!naive) return;
  command->add_flag("--naive-norm", o.naive_norm, "GPU: RMSNorm as separate operations, for comparison")
      ->group("Device");
  command->add_flag("--naive-attention", o.naive_attention, "GPU: attention with its matrix of scores in memory")
      ->group("Device");
  command->add_flag("--naive-ce", o.naive_ce, "GPU: cross-entropy as separate operations")->group("Device");
}

}  // namespace mm
