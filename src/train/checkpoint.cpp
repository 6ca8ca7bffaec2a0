#include "train/checkpoint.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "formats/safetensors.h"

namespace mm {

namespace stdfs = std::filesystem;

static std::string checkpoints_dir(const std::string& run_dir) { return path_join(run_dir, "checkpoints"); }

// Steps that have a folder, newest first.
static std::vector<std::pair<int64_t, std::string>> list_checkpoints(const std::string& run_dir) {
  std::vector<std::pair<int64_t, std::string>> found;
  std::error_code ec;
  for (const auto& entry : stdfs::directory_iterator(checkpoints_dir(run_dir), ec)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("step-", 0) != 0 || name.find_first_not_of("0123456789", 5) != std::string::npos || name.size() > 20)
      continue;
    found.emplace_back(std::stoll(name.substr(5)), entry.path().string());
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

static ordered_json fingerprint_of(const std::string& dir) {
  ordered_json files = ordered_json::object();
  for (const auto& entry : stdfs::recursive_directory_iterator(dir)) {
    if (!entry.is_regular_file()) continue;
    const MappedFile f(entry.path().string());
    files[stdfs::relative(entry.path(), dir).string()] = {{"bytes", f.size()},
                                                          {"hash", fmt::format("{:016x}", hash_bytes(f.text()))}};
  }
  return files;
}

// Of everything that state.json says but the hash itself.
static std::string hash_of_state(ordered_json state) {
  state.erase("hash");
  return fmt::format("{:016x}", hash_bytes(state.dump()));
}

static ordered_json read_state(const std::string& dir) {
  const std::string path = path_join(dir, "trainer/state.json");
  ordered_json state = load_json(path);
  const auto hash = json_get<std::string>(state, "hash", path);
  if (hash != hash_of_state(state)) throw Error(path, "the values that were written", "other values");
  return state;
}

static void check_whole(const std::string& dir) {
  const ordered_json state = read_state(dir);
  const ordered_json files = json_get<ordered_json>(state, "files", dir);
  for (const auto& [name, want] : files.items()) {
    const MappedFile f(path_join(dir, name));
    const auto bytes = json_get<uint64_t>(want, "bytes", dir);
    if (f.size() != bytes) throw Error(path_join(dir, name), fmt::format("{} bytes", bytes), std::to_string(f.size()));
    if (fmt::format("{:016x}", hash_bytes(f.text())) != json_get<std::string>(want, "hash", dir)) {
      throw Error(path_join(dir, name), "the bytes that were written", "other bytes");
    }
  }
}

static bool is_whole(const std::string& dir) {
  try {
    check_whole(dir);
    return true;
  } catch (const Error&) {
    return false;
  }
}

void save_checkpoint(const std::string& run_dir, int64_t step, const Model& model, TrainStep& train,
                     const Tokenizer& tokenizer, const ordered_json& state, int64_t keep) {
  const std::string parent = checkpoints_dir(run_dir), name = fmt::format("step-{:08}", step);
  const std::string final_dir = path_join(parent, name),
                    tmp = path_join(parent, fmt::format(".{}.tmp.{}", name, ::getpid()));
  if (dir_exists(final_dir) && is_whole(final_dir)) return;
  make_dirs(parent);
  std::error_code ignored;
  for (const auto& entry : stdfs::directory_iterator(parent, ignored)) {  // left by a killed run
    if (entry.path().filename().string().rfind(".step-", 0) == 0) stdfs::remove_all(entry.path(), ignored);
  }
  try {
    train.pull();
    model.save(tmp);
    tokenizer.save(tmp);
    std::vector<TensorToWrite> moments;
    for (const ParamSpec& spec : model.table.specs()) {
      moments.push_back({"m." + spec.hf_name, train.moment1().view(spec), DType::f32});
      moments.push_back({"v." + spec.hf_name, train.moment2().view(spec), DType::f32});
    }
    write_safetensors(path_join(tmp, "trainer/moments.safetensors"), moments);
    ordered_json saved = state;
    saved["files"] = fingerprint_of(tmp);
    saved["hash"] = hash_of_state(saved);
    write_file(path_join(tmp, "trainer/state.json"), saved.dump(2) + "\n");
    stdfs::remove_all(final_dir);  // there is one only if it is damaged
    stdfs::rename(tmp, final_dir);
  } catch (const stdfs::filesystem_error& e) {
    stdfs::remove_all(tmp, ignored);
    throw Error(fmt::format("{}: cannot save the checkpoint: {}", final_dir, e.what()));
  } catch (...) {
    stdfs::remove_all(tmp, ignored);
    throw;
  }
  fsync_dir(parent);
  int64_t kept = 0;
  for (const auto& [of_step, dir] : list_checkpoints(run_dir)) {
    if (of_step > step || ++kept > std::max<int64_t>(keep, 1)) stdfs::remove_all(dir, ignored);
  }
}

// What AtomicFile calls its temporaries: "model.safetensors.tmp.4711.3".
static bool is_temporary(std::string_view name) {
  const size_t at = name.find(".tmp.");
  return at != std::string_view::npos && name.find_first_not_of("0123456789.", at + 5) == std::string_view::npos;
}

void remove_temporaries(const std::string& run_dir) {
  std::error_code ignored;
  for (const auto& folder : {run_dir, path_join(run_dir, "best"), path_join(run_dir, "cache")}) {
    for (const auto& entry : stdfs::directory_iterator(folder, ignored)) {
      if (is_temporary(entry.path().filename().string())) stdfs::remove(entry.path(), ignored);
    }
  }
}

void remove_checkpoints(const std::string& run_dir) {
  std::error_code ec;
  stdfs::remove_all(checkpoints_dir(run_dir), ec);
  if (ec) throw Error(fmt::format("{}: cannot remove the checkpoints: {}", checkpoints_dir(run_dir), ec.message()));
}

std::string find_checkpoint(const std::string& run_dir) {
  for (const auto& [step, dir] : list_checkpoints(run_dir)) {
    try {
      check_whole(dir);
      return dir;
    } catch (const Error& e) {
      log_warn("checkpoint of step {} is damaged ({}); trying the one before", step, e.what());
    }
  }
  return "";
}

ordered_json load_checkpoint(const std::string& dir, Model& model, TrainStep& train) {
  model.read_weights(dir);
  const SafetensorsFile moments = SafetensorsFile::open(path_join(dir, "trainer/moments.safetensors"));
  for (const ParamSpec& spec : model.table.specs()) {
    moments.at("m." + spec.hf_name, spec.shape).read_floats(train.moment1().view(spec));
    moments.at("v." + spec.hf_name, spec.shape).read_floats(train.moment2().view(spec));
  }
  train.push();
  return read_state(dir);
}

}  // namespace mm
