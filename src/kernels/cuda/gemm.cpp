#include "kernels/cuda/gemm.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <vector>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/log.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/hopper_gemm.h"
#include "tensor/memory.h"

namespace mm::cuda {

namespace {

constexpr size_t workspace = size_t{32} << 20;  // NVIDIA's advice for Hopper
constexpr int candidates = 24;
constexpr size_t finalists = 4;

#define MM_CUBLASLT_FUNCTIONS(X)     \
  X(cublasLtCreate)                  \
  X(cublasLtDestroy)                 \
  X(cublasLtGetVersion)              \
  X(cublasLtMatmul)                  \
  X(cublasLtMatmulAlgoGetHeuristic)  \
  X(cublasLtMatmulAlgoCheck)         \
  X(cublasLtMatmulDescCreate)        \
  X(cublasLtMatmulDescDestroy)       \
  X(cublasLtMatmulDescSetAttribute)  \
  X(cublasLtMatrixLayoutCreate)      \
  X(cublasLtMatrixLayoutDestroy)     \
  X(cublasLtMatmulPreferenceCreate)  \
  X(cublasLtMatmulPreferenceDestroy) \
  X(cublasLtMatmulPreferenceSetAttribute)

struct Library {
#define MM_DECLARE(name) decltype(&::name) name = nullptr;
  MM_CUBLASLT_FUNCTIONS(MM_DECLARE)
#undef MM_DECLARE
  Library() {
    constexpr int major = CUBLAS_VER_MAJOR;
    const std::string name = "libcublasLt.so." + std::to_string(major);
    void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    for (const char* dir : {"/usr/local/cuda/lib64/", "/usr/local/cuda/targets/x86_64-linux/lib/"}) {
      if (handle == nullptr) handle = dlopen((dir + name).c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    if (handle == nullptr) {
      throw Error("--device cuda", name + " (CUDA toolkit, or beside the program in lib/)", "none",
                  "add its folder to LD_LIBRARY_PATH");
    }
#define MM_RESOLVE(f)                                                \
  f = reinterpret_cast<decltype(f)>(dlsym(handle, #f)); /* NOLINT */ \
  if (f == nullptr) throw Error(name, #f, "a library without it");
    MM_CUBLASLT_FUNCTIONS(MM_RESOLVE)
#undef MM_RESOLVE
  }
};

void require(cublasStatus_t s, const char* what, const GemmShape& g) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  throw Error(std::string("cuBLASLt: ") + what, "success",
              fmt::format("status {} for m {} n {} k {}", static_cast<int>(s), g.m, g.n, g.k));
}

cudaDataType_t data_type(DType t) {
  switch (t) {
    case DType::bf16: return CUDA_R_16BF;
    case DType::f16: return CUDA_R_16F;
    case DType::f32: return CUDA_R_32F;
    default: MM_CHECK(false, "{}", dtype_name(t));
  }
  return CUDA_R_32F;
}

std::string key_of(const GemmShape& g) {
  return fmt::format("m{} n{} k{} lda{} ldb{} ldd{} ldc{} {}{} {} {} {}", g.m, g.n, g.k, g.lda, g.ldb, g.ldd, g.ldc,
                     g.trans_a ? 't' : 'n', g.trans_b ? 't' : 'n', g.add_c ? "add" : "set", dtype_name(g.in),
                     dtype_name(g.out)) +
         (g.aligned ? "" : " unaligned");
}

std::string hex_of(const cublasLtMatmulAlgo_t& algo) {
  std::string s;
  for (const uint64_t word : algo.data) s += fmt::format("{:016x}", word);
  return s;
}

bool from_hex(const std::string& s, cublasLtMatmulAlgo_t& algo) {
  if (s.size() != 16 * std::size(algo.data)) return false;
  for (size_t i = 0; i < std::size(algo.data); i++) {
    char* end = nullptr;
    const std::string part = s.substr(16 * i, 16);
    algo.data[i] = std::strtoull(part.c_str(), &end, 16);
    if (*end != 0) return false;
  }
  return true;
}

std::string cache_dir() {
  if (const char* d = std::getenv("XDG_CACHE_HOME"); d != nullptr && d[0] == '/') return path_join(d, "minimind");
  const char* home = std::getenv("HOME");
  return home == nullptr || home[0] != '/' ? "" : path_join(home, ".cache/minimind");
}

// The same product by our own kernel.
HopperGemm own_form(const GemmShape& g, void* d, const void* a, const void* b, const void* c) {
  HopperGemm h;
  h.layout = g.trans_a ? GemmLayout::wgrad : g.trans_b ? GemmLayout::fwd : GemmLayout::dgrad;
  h.a = a;
  h.b = b;
  h.out = d;
  h.m = g.m;
  h.n = g.n;
  h.k = g.k;
  h.lda = g.lda;
  h.ldb = g.ldb;
  h.ldo = g.ldd;
  if (g.add_c && !g.trans_a) {
    h.epilogue = GemmEpilogue::residual;
    h.residual = c;
    h.ldr = g.ldc;
  }
  return h;
}

bool own_fits(const Context& ctx, const GemmShape& g, void* d, const void* a, const void* b, const void* c) {
  if (g.in != DType::bf16 || (g.trans_a && g.trans_b)) return false;
  // Its weight gradients add to c in place, in fp32; the other forms are bf16.
  if (g.trans_a ? g.out != DType::f32 || !g.add_c || c != d : g.out != DType::bf16) return false;
  return hopper_gemm_fits(ctx, own_form(g, d, a, b, c));
}

// cuBLASLt thinks in columns: a row-major matrix is its transpose there, so D^T = op(B)^T op(A)^T.
struct Plan {
  bool own = false;  // by hopper_gemm
  cublasLtMatmulDesc_t op = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;  // a is our B
  cublasLtMatmulAlgo_t algo{};
};

}  // namespace

struct Gemm::Impl {
  const Context& ctx;
  Library lib;
  cublasLtHandle_t handle = nullptr;
  void* space = nullptr;
  cudaEvent_t start = nullptr, stop = nullptr;
  std::map<GemmShape, Plan> plans;
  std::string cache_path;
  ordered_json cache = ordered_json::object();

  explicit Impl(const Context& c) : ctx(c) {
    require(lib.cublasLtCreate(&handle), "create", {});
    space = allocate(workspace, Memory::cuda);
    MM_CUDA_CHECK(cudaEventCreate(&start));
    MM_CUDA_CHECK(cudaEventCreate(&stop));
    const std::string dir = cache_dir();
    if (dir.empty()) return;
    std::string gpu = cuda_status().name;
    std::replace_if(
        gpu.begin(), gpu.end(), [](char ch) { return std::isalnum(static_cast<unsigned char>(ch)) == 0; }, '-');
    cache_path = path_join(dir, fmt::format("gemm-{}-{}.json", gpu, lib.cublasLtGetVersion()));
    try {
      if (file_exists(cache_path)) cache = load_json(cache_path);
    } catch (const Error& e) {
      log_warn("the choices of matrix products are timed again: {}", e.what());
    }
    if (!cache.is_object()) cache = ordered_json::object();
  }
  ~Impl() {
    for (auto& [shape, p] : plans) destroy(p);
    if (space != nullptr) release(space, workspace, Memory::cuda);
    for (cudaEvent_t e : {start, stop}) {
      if (e != nullptr) (void)cudaEventDestroy(e);
    }
    if (handle != nullptr) lib.cublasLtDestroy(handle);
  }
  void destroy(Plan& p) {
    for (cublasLtMatrixLayout_t l : {p.a, p.b, p.c, p.d}) {
      if (l != nullptr) lib.cublasLtMatrixLayoutDestroy(l);
    }
    if (p.op != nullptr) lib.cublasLtMatmulDescDestroy(p.op);
  }

  cublasStatus_t launch(const GemmShape& g, const Plan& p, const cublasLtMatmulAlgo_t& algo, void* d, const void* a,
                        const void* b, const void* c) {
    if (p.own) {
      hopper_gemm(ctx, own_form(g, d, a, b, c));
      return CUBLAS_STATUS_SUCCESS;
    }
    const float one = 1.0f, beta = g.add_c ? 1.0f : 0.0f;
    return lib.cublasLtMatmul(handle, p.op, &one, b, p.a, a, p.b, &beta, g.add_c ? c : d, p.c, d, p.d, &algo, space,
                              workspace, ctx.stream);
  }

  Plan make(const GemmShape& g) {
    Plan p;
    require(lib.cublasLtMatmulDescCreate(&p.op, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor", g);
    const cublasOperation_t op_a = g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    lib.cublasLtMatmulDescSetAttribute(p.op, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof(op_a));
    lib.cublasLtMatmulDescSetAttribute(p.op, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof(op_b));
    const auto layout = [&](cublasLtMatrixLayout_t* l, DType t, int64_t rows, int64_t cols, int64_t ld) {
      require(
          lib.cublasLtMatrixLayoutCreate(l, data_type(t), static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), ld),
          "layout", g);
    };
    layout(&p.a, g.in, g.trans_b ? g.k : g.n, g.trans_b ? g.n : g.k, g.ldb);
    layout(&p.b, g.in, g.trans_a ? g.m : g.k, g.trans_a ? g.k : g.m, g.lda);
    layout(&p.c, g.out, g.n, g.m, g.add_c ? g.ldc : g.ldd);
    layout(&p.d, g.out, g.n, g.m, g.ldd);
    return p;
  }

  std::vector<cublasLtMatmulAlgo_t> propose(const GemmShape& g, const Plan& p) {
    cublasLtMatmulPreference_t pref = nullptr;
    require(lib.cublasLtMatmulPreferenceCreate(&pref), "preference", g);
    const size_t bytes = workspace;
    lib.cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
    const uint32_t alignment = g.aligned ? 16 : static_cast<uint32_t>(std::min(dtype_size(g.in), dtype_size(g.out)));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      lib.cublasLtMatmulPreferenceSetAttribute(pref, attribute, &alignment, sizeof(alignment));
    // In-place sums of partial results would depend on who comes first.
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    lib.cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                             sizeof(schemes));
    cublasLtMatmulHeuristicResult_t found[candidates];
    int n = 0;
    const cublasStatus_t s =
        lib.cublasLtMatmulAlgoGetHeuristic(handle, p.op, p.a, p.b, p.c, p.d, pref, candidates, found, &n);
    lib.cublasLtMatmulPreferenceDestroy(pref);
    require(s, "no algorithm", g);
    std::vector<cublasLtMatmulAlgo_t> algos;
    for (int i = 0; i < n; i++) {
      if (found[i].state == CUBLAS_STATUS_SUCCESS) algos.push_back(found[i].algo);
    }
    if (algos.empty()) require(CUBLAS_STATUS_NOT_SUPPORTED, "no algorithm", g);
    return algos;
  }

  // Milliseconds of one product by `p`, the best of `rounds` rows of `launches` products; negative when it fails.
  float time(const GemmShape& g, const Plan& p, int rounds, int launches, void* d, const void* a, const void* b) {
    float best = -1;
    for (int r = 0; r < rounds; r++) {
      cudaEventRecord(start, ctx.stream);
      for (int i = 0; i < launches; i++) {
        if (launch(g, p, p.algo, d, a, b, d) != CUBLAS_STATUS_SUCCESS) return -1;
      }
      cudaEventRecord(stop, ctx.stream);
      float ms = 0;
      if (cudaEventSynchronize(stop) != cudaSuccess || cudaEventElapsedTime(&ms, start, stop) != cudaSuccess) return -1;
      if (best < 0 || ms < best) best = ms;
    }
    return best / static_cast<float>(launches);
  }

  // Chooses among the proposals and, where it fits, our own kernel; into memory of its own so that `+=` stays harmless.
  // First all of them roughly, then the best few in rows of launches: a GPU at work runs at other clocks than one that
  // is woken for a single product.
  void choose(const GemmShape& g, Plan& p, const std::vector<cublasLtMatmulAlgo_t>& algos, bool own, const void* a,
              const void* b) {
    const size_t bytes = static_cast<size_t>(g.m * std::max(g.ldd, g.ldc)) * dtype_size(g.out);
    p.algo = algos.front();
    void* d = nullptr;
    if (cudaMalloc(&d, bytes) != cudaSuccess) {
      (void)cudaGetLastError();
      return;
    }
    cudaMemsetAsync(d, 0, bytes, ctx.stream);
    std::vector<std::pair<float, Plan>> trials;
    for (size_t i = 0; i < algos.size() + (own ? 1 : 0); i++) {
      Plan trial = p;
      trial.own = i == algos.size();
      if (!trial.own) trial.algo = algos[i];
      if (const float ms = time(g, trial, 3, 1, d, a, b); ms >= 0) trials.emplace_back(ms, trial);
    }
    std::stable_sort(trials.begin(), trials.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
    trials.resize(std::min<size_t>(trials.size(), finalists));
    for (auto& [ms, trial] : trials) ms = time(g, trial, 3, 8, d, a, b);
    cudaFree(d);
    MM_CUDA_CHECK(cudaGetLastError());
    const auto best = std::min_element(trials.begin(), trials.end(), [](const auto& x, const auto& y) {
      return x.first >= 0 && (y.first < 0 || x.first < y.first);
    });
    if (best == trials.end() || best->first < 0) return;
    p.own = best->second.own;
    p.algo = best->second.algo;
    log_debug("product {}: {} of {} candidates{}, {:.4f} ms, {:.0f} TFLOP/s", key_of(g),
              p.own ? "own kernel" : "cuBLASLt", algos.size(), own ? " and the own kernel" : "", best->first,
              2e-9 * static_cast<double>(g.m * g.n * g.k) / best->first);
  }

  void remember(const GemmShape& g, const Plan& p) {
    cache[key_of(g)] = p.own ? "own" : hex_of(p.algo);
    if (cache_path.empty()) return;
    try {
      make_dirs(std::filesystem::path(cache_path).parent_path().string());
      write_file(cache_path, cache.dump(1) + "\n");
    } catch (const Error& e) {
      log_warn("the choices of matrix products were not kept: {}", e.what());
      cache_path.clear();
    }
  }

  const Plan& plan(const GemmShape& g, void* d, const void* a, const void* b, const void* c) {
    if (const auto it = plans.find(g); it != plans.end()) return it->second;
    const bool own = own_fits(ctx, g, d, a, b, c);
    Plan p = make(g);
    try {
      cublasLtMatmulHeuristicResult_t checked{};
      const auto known = cache.find(key_of(g));
      if (own && known != cache.end() && *known == "own") {
        p.own = true;
        return plans.emplace(g, p).first->second;
      }
      if (known != cache.end() && known->is_string() && from_hex(known->get<std::string>(), p.algo) &&
          lib.cublasLtMatmulAlgoCheck(handle, p.op, p.a, p.b, p.c, p.d, &p.algo, &checked) == CUBLAS_STATUS_SUCCESS &&
          checked.workspaceSize <= workspace) {
        return plans.emplace(g, p).first->second;
      }
      const auto algos = propose(g, p);
      cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
      MM_CUDA_CHECK(cudaStreamIsCapturing(ctx.stream, &capturing));
      // Not worth the wait: products of a few microseconds, and odd numbers of tokens, which come once (validation
      // rows, prompts; training passes are padded to tiles). Nor can a capture time anything.
      const bool comes_again = g.m % 64 == 0 && g.n % 64 == 0 && g.k % 64 == 0;
      const bool timed = capturing == cudaStreamCaptureStatusNone && comes_again && g.m * g.n * g.k >= int64_t{1} << 27;
      p.algo = algos.front();
      if (timed) {
        choose(g, p, algos, own, a, b);
        remember(g, p);
      }
    } catch (...) {
      destroy(p);
      throw;
    }
    return plans.emplace(g, p).first->second;
  }
};

Gemm::Gemm(const Context& ctx) : impl_(std::make_unique<Impl>(ctx)) {}
Gemm::~Gemm() = default;
size_t Gemm::workspace_bytes() { return workspace; }

void Gemm::run(GemmShape g, void* d, const void* a, const void* b, const void* c) {
  if (g.m == 0 || g.n == 0) return;
  const auto in = static_cast<int64_t>(dtype_size(g.in)), out = static_cast<int64_t>(dtype_size(g.out));
  if (g.k == 0) {  // an empty sum, which the library refuses
    MM_CHECK(!g.add_c || c == d);
    if (!g.add_c) {
      MM_CUDA_CHECK(cudaMemset2DAsync(d, static_cast<size_t>(g.ldd * out), 0, static_cast<size_t>(g.n * out),
                                      static_cast<size_t>(g.m), impl_->ctx.stream));
    }
    return;
  }
  const auto at = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); };
  const int64_t bits =
      at(d) | at(a) | at(b) | (g.add_c ? at(c) | g.ldc * out : 0) | g.lda * in | g.ldb * in | g.ldd * out;
  g.aligned = bits % 16 == 0;
  const Plan& p = impl_->plan(g, d, a, b, c);
  require(impl_->launch(g, p, p.algo, d, a, b, c), "product", g);
}

}  // namespace mm::cuda
