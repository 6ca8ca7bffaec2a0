#include "engine/chat_session.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "text/bpe_trainer.h"
#include "text/chat_template.h"

namespace mm {

static Tokenizer small_tokenizer() {
  BpeTrainer trainer({.vocab_size = 300});
  trainer.feed({"hello hello", "think about it"});
  return trainer.train();
}

TEST(ChatSession, PromptIsTheTemplate) {
  const Tokenizer tokenizer = small_tokenizer();
  ChatSession chat(tokenizer);
  chat.set_system("be kind");
  chat.add_user("hi");
  chat.add_answer("hello\n");
  chat.add_user("more");
  int dropped = -1;
  EXPECT_EQ(tokenizer.decode(chat.prompt(1000, &dropped)),
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nhello\n<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n");
  EXPECT_EQ(dropped, 0);
  chat.set_open_thinking(true);
  const std::string text = tokenizer.decode(chat.prompt(1000, &dropped));
  EXPECT_TRUE(text.ends_with("<|im_start|>assistant\n<think>\n")) << text;
  chat.set_system("");
  EXPECT_EQ(chat.messages()[0]["role"], "user");
}

TEST(ChatSession, EmptyThinkingCanBeLeftOut) {
  const Tokenizer tokenizer = small_tokenizer();
  ChatSession chat(tokenizer, /*keep_empty_think=*/false);
  chat.add_user("hi");
  chat.add_answer("<think>\nhm\n</think>\n\nhello");
  chat.add_user("more");
  chat.add_answer("yes");
  chat.add_user("so");
  int dropped = 0;
  EXPECT_EQ(tokenizer.decode(chat.prompt(1000, &dropped)),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nhello<|im_end|>\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
            "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatSession, ThoughtsAreKeptApart) {
  ChatSession chat(small_tokenizer());
  chat.set_open_thinking(true);
  chat.add_user("2+2");
  chat.add_answer("add them\n</think>\n\n4");
  EXPECT_EQ(chat.messages()[1],
            (ordered_json{{"role", "assistant"}, {"content", "4"}, {"reasoning_content", "add them"}}));
  chat.set_open_thinking(false);
  chat.add_user("3+3");
  chat.add_answer("6");
  EXPECT_EQ(chat.messages()[3], (ordered_json{{"role", "assistant"}, {"content", "6"}}));
}

TEST(ChatSession, SplitAnswer) {
  const auto check = [](std::string_view text, bool open, const char* reasoning, const char* content) {
    const auto parts = split_answer(text, open);
    EXPECT_EQ(parts.reasoning, reasoning) << text;
    EXPECT_EQ(parts.content, content) << text;
  };
  check("plain\n", false, "", "plain\n");
  check("cut in the middle", true, "cut in the middle", "");
  check("why\n</think>\n\nanswer", true, "why", "answer");
  check("<think>\nwhy\n</think>\n\nanswer", false, "why", "answer");
  check("<think>\n\n</think>\n\nanswer", false, "", "answer");
}

TEST(ChatSession, TheOldestTurnsGoWhenTheContextIsFull) {
  const Tokenizer tokenizer = small_tokenizer();
  ChatSession chat(tokenizer);
  chat.set_system("keep me");
  for (int turn = 0; turn < 5; turn++) {
    if (turn > 0) chat.add_answer("answer " + std::to_string(turn));
    chat.add_user("question " + std::to_string(turn));
  }
  int dropped = 0;
  const auto all = chat.prompt(10000, &dropped);
  EXPECT_EQ(dropped, 0);
  const auto limit = static_cast<int64_t>(all.size()) - 1;
  const auto fewer = chat.prompt(limit, &dropped);
  EXPECT_EQ(dropped, 1);
  EXPECT_LE(static_cast<int64_t>(fewer.size()), limit);
  EXPECT_EQ(chat.messages()[0]["content"], "keep me");
  EXPECT_EQ(chat.messages()[1]["content"], "question 1");
  const auto messages = chat.messages();
  EXPECT_THROW(chat.prompt(20, &dropped), Error);  // not even the last turn fits: it is taken back
  EXPECT_EQ(chat.messages().size(), messages.size() - 1);
  EXPECT_EQ(chat.messages().back()["role"], "assistant");
  chat.reset();
  EXPECT_EQ(chat.messages().size(), 1u);
}

}  // namespace mm
