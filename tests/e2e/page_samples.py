"""What several tests of the chat page show it: a text with all of its markdown, a value for each number in the settings."""

MARKDOWN = """# Title

A *soft* and **loud** and ***both*** and ~~gone~~ word, `x < 1`, snake_case_name, 2 * 3 * 4, \\*plain\\*.
Second line with https://example.com/a_(b). And <https://example.org/x>.

3. third
4. fourth
   - inner **bold**
     - [x] done
     - [ ] open

| a | b |
|:-:|--:|
| 1 | `x|y` |
| **2** | \\| |

> quoted *text*
> - item

```cpp
int main() { return 42; }  // "comment"
const char* s = "a // b";
```

---
[name](https://example.com/?q=1 "t") ![alt](https://example.com/i.png) [bad](javascript:alert(1)) [rel](/etc)
中文**“加粗”**文字。

~~~
plain
"""

VALUES = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "presence_penalty": "0.5", "frequency_penalty": "-0.5",
          "repetition_penalty": "1.1", "max_tokens": "128", "seed": "42"}
