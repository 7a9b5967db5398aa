// What compute-sanitizer's racecheck makes of a tile that passes between warpgroups, as in
// hopper_gradients.py: a control for its reports on those kernels.
//
//     nvcc -arch=sm_90 -o control tests/sanitizer_control.cu
//     for mode in 0 1 2; do compute-sanitizer --tool racecheck ./control $mode; done
//
// 0: every writer arrives at the mbarrier that the readers wait for.
// 1: the writers meet at a named barrier, then one of them arrives: the same order, and what Triton
//    emits for mbarrier.arrive.
// 2: nobody waits: a race.
#include <cstdio>
#include <cstdlib>

__global__ void pass(const int *in, int *out, int mode) {
  __shared__ int tile[128];
  __shared__ alignas(8) unsigned long long bar;
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&bar));
  const int lane = threadIdx.x % 128;
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(mode == 0 ? 128 : 1));
  __syncthreads();
  if (threadIdx.x < 128) {
    tile[lane] = in[lane] + 1;
    if (mode != 0) asm volatile("bar.sync 1, 128;" ::: "memory");
    if (mode == 0 || lane == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  } else {
    if (mode != 2)
      asm volatile(
          "{ .reg .pred done;\n"
          "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
          "@!done bra WAIT; }" ::"r"(address) : "memory");
    out[lane] = tile[127 - lane];
  }
}

int main(int, char **argv) {
  const int mode = atoi(argv[1]);
  int *in, *out, result[128];
  cudaMalloc(&in, sizeof result);
  cudaMalloc(&out, sizeof result);
  cudaMemset(in, 0, sizeof result);
  pass<<<1, 256>>>(in, out, mode);
  if (cudaMemcpy(result, out, sizeof result, cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
  int sum = 0;
  for (int x : result) sum += x;
  printf("mode %d: %d of 128 values arrived\n", mode, sum);
}
