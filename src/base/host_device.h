// MM_HD: an inline function for the host and, where a CUDA compiler reads it, for the device.
#pragma once

#if defined(__CUDACC__)
#define MM_HD __host__ __device__ __forceinline__
#else
#define MM_HD inline
#endif
