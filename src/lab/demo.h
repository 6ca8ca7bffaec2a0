// `minimind demo`: a tokenizer and a small bilingual model from nothing, in minutes, and proof that it learnt.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "lab/demo_eval.h"
#include "tensor/device.h"
#include "train/trainer.h"

namespace mm {

struct DemoOptions {
  std::string output = "demo";
  uint64_t seed = 42;
  double budget = 1;       // share of the full training data, in (0, 10]; below about 0.6 the model can hardly add
  bool overwrite = false;  // replace what an earlier demo wrote to `output`
  Device device;
};

struct DemoReport {
  bool interrupted = false;              // Ctrl-C: the run is saved, and the fields of later stages are empty
  std::string model, loss_plot, report;  // paths: model folder, SVG, report.json
  int64_t parameters = 0, vocab = 0;
  TrainResult pretrain, sft;
  DemoScore additions, two_steps, facts;
  double seconds = 0;
  ordered_json conversation =
      ordered_json::array();  // [{"user", "parts": [{"think" | "call" | "result" | "answer": text}]}]
  ordered_json to_json() const;
};

using DemoSink = std::function<void(const std::string& line)>;  // what a person reads while it runs

// Writes OUTPUT/data, tokenizer, pretrain, sft (the model to chat with), loss.svg and report.json. An interrupted demo
// goes on where it stopped when it is run again with the same seed and budget. Error when `output` holds anything else,
// or a finished demo and not `overwrite`.
DemoReport run_demo(const DemoOptions& options, const DemoSink& say);

}  // namespace mm
