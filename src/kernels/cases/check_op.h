// How an op is tested: the same inputs through the specification in double (exact), the specification in float (plain)
// and every backend, with sentinels around each output. Header-only so that the tests of another device use it too.
//
// An output starts as `fill` where the op sets it (=), so a kernel that reads it yields NaN, and as numbers where the
// op adds to it (+=). Elements that the exact run leaves at the fill (padding between rows, rows that no slot names)
// must keep their bits.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/rng.h"
#include "base/thread_team.h"
#include "kernels/kernel_table.h"

namespace mm::cases {

// N(0, 1) numbers, the same in float and double; the float ones end where the allocation ends, so that a sanitizer sees
// a read beyond.
class Input {
 public:
  Input(int64_t n, uint64_t stream, int offset = 0, float scale = 1.0f)
      : floats_(static_cast<size_t>(n + offset) + (n + offset == 0)),
        doubles_(static_cast<size_t>(n) + 1),
        skip_(offset) {
    for (int64_t i = 0; i < n; i++) set(i, scale * philox_normal(7, stream, static_cast<uint64_t>(i)));
  }
  void set(int64_t i, float x) {
    floats_[static_cast<size_t>(i + skip_)] = x;
    doubles_[static_cast<size_t>(i)] = x;
  }
  template <class T>
  const T* get() const {
    if constexpr (std::is_same_v<T, float>) return floats_.data() + skip_;
    else return doubles_.data();
  }
  const float* f() const { return get<float>(); }

 private:
  std::vector<float> floats_;
  std::vector<double> doubles_;
  int skip_;
};

// n elements with sentinel bytes before and after.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t n, int offset = 0)
      : bytes_((n + static_cast<size_t>(offset)) * sizeof(T) + 2 * guard, sentinel), n_(n) {
    begin_ = guard + static_cast<size_t>(offset) * sizeof(T);
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data() + begin_); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data() + begin_); }
  size_t size() const { return n_; }
  bool intact() const {
    const size_t end = begin_ + n_ * sizeof(T);
    for (size_t i = 0; i < bytes_.size(); i++) {
      if ((i < begin_ || i >= end) && bytes_[i] != sentinel) return false;
    }
    return true;
  }

 private:
  static constexpr size_t guard = 256;
  static constexpr unsigned char sentinel = 0xa5;
  std::vector<unsigned char> bytes_;
  size_t n_, begin_;
};

inline float fill() { return std::bit_cast<float>(0x7fc0dead); }
inline bool same_bits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

struct Output {
  const char* name;
  std::vector<float> init;
  double floor;  // see tolerance.h; 0: as exact as the plain implementation
};

inline Output set_output(const char* name, int64_t n, double floor) {
  return {name, std::vector<float>(static_cast<size_t>(n), fill()), floor};
}

inline Output added_output(const char* name, int64_t n, uint64_t stream, double floor) {  // or changed in place
  const Input x(n, stream);
  return {name, std::vector<float>(x.f(), x.f() + n), floor};
}

// Fixture of the kernel tests: MINIMIND_CPU may ask for an instruction set that this machine lacks.
class KernelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      selected_isa();
    } catch (const Error& e) {
      GTEST_SKIP() << e.what();
    }
  }
};

struct Backend {
  std::string name;
  KernelTable kernels;
  int threads = 1;
  bool float_squares = false;  // sum_sq squares in float: neither the range nor the digits of double
};

// What runs in a test program (kernels/check_backends_test.cpp): the CPU's drivers on 1 to 4 threads and, where there
// is one, the GPU (cases/cuda_backend.h); and, first those, then the row kernels of every instruction set that this
// machine has in place of the drivers of the same signature (rmsnorm, swiglu, logprob, sum_sq).
const std::vector<Backend>& cpu_backends();
const std::vector<Backend>& cpu_and_row_backends();

enum class Bits { same, any };  // across the thread counts of one backend

inline void expect_close(const Output& out, const float* got, const std::vector<float>& plain,
                         const std::vector<double>& exact) {
  double err = 0, err_plain = 0;
  size_t at = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    if (std::isnan(exact[i])) {
      ASSERT_TRUE(same_bits(got[i], out.init[i])) << out.name << "[" << i << "] is not the op's to write";
      continue;
    }
    const double e = std::abs(got[i] - exact[i]);
    ASSERT_TRUE(std::isfinite(e)) << out.name << "[" << i << "] is " << got[i] << ", exact " << exact[i];
    if (e > err) err = e, at = i;
    err_plain = std::max(err_plain, std::abs(plain[i] - exact[i]));
  }
  EXPECT_LE(err, 2 * err_plain + out.floor) << out.name << "[" << at << "] is " << got[at] << ", exact " << exact[at]
                                            << ", plain fp32 is off by " << err_plain;
}

// spec(T** out) runs the specification, T being float and double; run(kernels, float** out) runs a backend.
template <class Spec, class Run>
void check_op(const std::string& case_name, int offset, const std::vector<Output>& outputs, Spec&& spec, Run&& run,
              Bits bits = Bits::same, const std::vector<Backend>& backends = cpu_backends()) {
  std::vector<std::vector<double>> exact;
  std::vector<std::vector<float>> plain;
  for (const Output& o : outputs) {
    exact.emplace_back(o.init.begin(), o.init.end()).push_back(0.0);  // never a null pointer, even when empty
    plain.emplace_back(o.init).push_back(0.0f);
  }
  std::vector<double*> exact_ptr;
  std::vector<float*> plain_ptr;
  for (auto& v : exact) exact_ptr.push_back(v.data());
  for (auto& v : plain) plain_ptr.push_back(v.data());
  spec(exact_ptr.data());
  spec(plain_ptr.data());
  for (auto& v : exact) v.pop_back();

  std::vector<std::vector<float>> first(outputs.size());  // backend, which runs on one thread
  for (const Backend& b : backends) {
    SCOPED_TRACE(fmt::format("{} on {} with {} threads", case_name, b.name, b.threads));
    std::vector<Guarded<float>> buffers;
    std::vector<float*> ptr;
    for (const Output& o : outputs) {
      buffers.emplace_back(o.init.size(), offset);
      std::copy(o.init.begin(), o.init.end(), buffers.back().data());
    }
    for (auto& g : buffers) ptr.push_back(g.data());
    set_num_threads(b.threads);
    run(b.kernels, ptr.data());
    set_num_threads(0);
    for (size_t i = 0; i < outputs.size(); i++) {
      EXPECT_TRUE(buffers[i].intact()) << "written outside " << outputs[i].name;
      expect_close(outputs[i], ptr[i], plain[i], exact[i]);
      if (bits == Bits::any || b.name != backends.front().name) continue;
      if (b.threads == 1) first[i].assign(ptr[i], ptr[i] + outputs[i].init.size());
      EXPECT_TRUE(std::equal(first[i].begin(), first[i].end(), ptr[i], same_bits))
          << outputs[i].name << " depends on the number of threads";
    }
  }
}

}  // namespace mm::cases
