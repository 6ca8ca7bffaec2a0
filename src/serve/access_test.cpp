#include "serve/access.h"

#include <gtest/gtest.h>

namespace mm {
namespace {

TEST(Access, Keys) {
  AccessRules rules;
  EXPECT_TRUE(key_allowed(rules, ""));
  rules.api_key = "secret";
  EXPECT_TRUE(key_allowed(rules, "Bearer secret"));
  EXPECT_TRUE(key_allowed(rules, "bearer secret"));
  for (const char* bad : {"", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Bearer secretsecret",
                          "Bearer Secret", "Basic secret", "secret"})
    EXPECT_FALSE(key_allowed(rules, bad)) << bad;
}

TEST(Access, HostsOfALoopbackServer) {
  const AccessRules rules{.allowed_hosts = {"proxy.test"}};
  for (const char* good : {"localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "127.9.9.9:1", "[::1]:8000",
                           "app.localhost:80", "proxy.test:443"}) {
    EXPECT_TRUE(host_allowed(rules, good)) << good;
  }
  for (const char* bad : {"", "evil.test", "127.0.0.1.evil.test", "localhost.evil.test", "evil.test:127.0.0.1",
                          "10.0.0.1", "[::2]", "notlocalhost"})
    EXPECT_FALSE(host_allowed(rules, bad)) << bad;
  EXPECT_TRUE(host_allowed({.loopback = false}, "evil.test"));
  EXPECT_TRUE(host_allowed(rules, std::nullopt));
}

TEST(Access, Origins) {
  const AccessRules rules{.origins = {"https://app.test"}};
  EXPECT_TRUE(origin_allowed(rules, "", "localhost:8000"));
  EXPECT_TRUE(origin_allowed(rules, "http://localhost:8000", "localhost:8000"));
  EXPECT_TRUE(origin_allowed(rules, "https://app.test", "localhost:8000"));
  for (const char* bad :
       {"null", "http://localhost:8001", "http://evil.test", "https://app.test.evil.test", "localhost:8000"})
    EXPECT_FALSE(origin_allowed(rules, bad, "localhost:8000")) << bad;
  for (const char* bad : {"http://", "http://evil.test"}) EXPECT_FALSE(origin_allowed(rules, bad, "")) << bad;
  EXPECT_EQ(allow_origin(rules, "https://app.test"), "https://app.test");
  EXPECT_EQ(allow_origin(rules, "http://localhost:8000"), "");
  EXPECT_EQ(allow_origin({.origins = {"*"}}, "http://any.test"), "http://any.test");
}

}  // namespace
}  // namespace mm
