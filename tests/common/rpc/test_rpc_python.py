"""
Goal:   health and reflection speak to a client that is not ours: Python's grpcio,
        which knows nothing of RedKnot but what reflection tells it.
Method: start rpc_peer, ask by raw bytes with hand-made wire messages, build the
        message classes from the reflected descriptors and call a method.
"""
import subprocess
import sys
import unittest

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PEER = sys.argv.pop(1)
TIMEOUT = 30


def raw(data):
    return data


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def text_field(number, text):
    data = text.encode()
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data):
    """(number, value) of each field of a message; only varints and lengths occur here."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
        else:
            assert key & 7 == 2, key
            length = number()
            yield key >> 3, data[at:at + length]
            at += length


class RpcTest(unittest.TestCase):
    def setUp(self):
        self.peer = subprocess.Popen([PEER, "127.0.0.1:0"], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True)
        port = int(self.peer.stdout.readline())
        self.channel = grpc.insecure_channel("127.0.0.1:%d" % port)

    def tearDown(self):
        self.channel.close()
        self.peer.communicate("stop\n", timeout=TIMEOUT)
        self.assertEqual(self.peer.returncode, 0)

    def tell(self, word):
        self.peer.stdin.write(word + "\n")
        self.peer.stdin.flush()

    def reflect(self, version, *requests):
        call = self.channel.stream_stream(
            "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo" % version,
            request_serializer=raw, response_deserializer=raw)
        return [dict(fields(reply)) for reply in call(iter(requests), timeout=TIMEOUT)]

    def check(self, service):
        call = self.channel.unary_unary("/grpc.health.v1.Health/Check",
                                        request_serializer=raw, response_deserializer=raw)
        return call(text_field(1, service), timeout=TIMEOUT)

    def test_health_check(self):
        self.assertEqual(self.check(""), b"\x08\x01")
        self.assertEqual(self.check("redknot.v1.Worker"), b"\x08\x01")
        with self.assertRaises(grpc.RpcError) as caught:
            self.check("nobody")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_health_watch_follows_changes_and_ends_with_the_server(self):
        watch = self.channel.unary_stream("/grpc.health.v1.Health/Watch",
                                          request_serializer=raw, response_deserializer=raw)
        states = watch(text_field(1, ""), timeout=TIMEOUT)
        unknown = watch(text_field(1, "nobody"), timeout=TIMEOUT)
        self.assertEqual(next(unknown), b"\x08\x03")
        self.assertEqual(next(states), b"\x08\x01")
        self.tell("down")
        self.assertEqual(next(states), b"\x08\x02")
        self.assertEqual(self.check(""), b"\x08\x02")
        self.tell("up")
        self.assertEqual(next(states), b"\x08\x01")
        unknown.cancel()
        self.tell("stop")
        with self.assertRaises(grpc.RpcError) as caught:
            next(states)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)

    def test_reflection_lists_and_refuses(self):
        for version in "v1", "v1alpha":
            listed, file, missing, no_file, extension, empty = self.reflect(
                version, text_field(7, "*"), text_field(3, "redknot/v1/common.proto"),
                text_field(4, "no.such.Symbol"), text_field(3, "no.proto"), text_field(6, "x"), b"")
            names = [dict(fields(row))[1].decode() for _, row in fields(listed[6])]
            self.assertEqual(sorted(names), [
                "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                "grpc.reflection.v1alpha.ServerReflection", "redknot.v1.Worker"])
            self.assertIn(4, file)
            for reply, code in (missing, 5), (no_file, 5), (extension, 5), (empty, 3):
                self.assertEqual(dict(fields(reply[7]))[1], code)
            for name in names + ["grpc.health.v1.HealthCheckResponse.ServingStatus",
                                 "redknot.v1.Worker.Tokenize", "redknot.v1.KvLayout.Dtype",
                                 "redknot.v1.LocateReply.Location"]:
                reply, = self.reflect(version, text_field(4, name))
                self.assertIn(4, reply, name)

    def test_a_client_that_knows_only_reflection_calls_a_method(self):
        reply, = self.reflect("v1alpha", text_field(4, "redknot.v1.Worker"))
        files = {}
        for _, data in fields(reply[4]):
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[file.name] = file
        pool = descriptor_pool.DescriptorPool()

        def add(name):
            for needed in files[name].dependency:
                if needed in files:
                    add(needed)
            if name in files:
                pool.Add(files.pop(name))

        while files:
            add(next(iter(files)))
        method = pool.FindServiceByName("redknot.v1.Worker").FindMethodByName("Tokenize")
        factory = message_factory.MessageFactory(pool)
        request = factory.GetPrototype(method.input_type)(text="seven..")
        call = self.channel.unary_unary(
            "/redknot.v1.Worker/Tokenize",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=factory.GetPrototype(method.output_type).FromString)
        reply = call(request, timeout=TIMEOUT)
        self.assertEqual(list(reply.token_ids), [7])

    def test_status_trailer(self):
        call = self.channel.unary_unary("/redknot.test.Echo/Status",
                                        request_serializer=raw, response_deserializer=raw)
        with self.assertRaises(grpc.RpcError) as caught:
            call(text_field(1, "MISS_EVICTED"), timeout=TIMEOUT)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)
        self.assertIn(("redknot-status", "MISS_EVICTED"), caught.exception.trailing_metadata())
        self.assertEqual(caught.exception.details(), "said MISS_EVICTED \u00e9 % ??")


if __name__ == "__main__":
    unittest.main()
